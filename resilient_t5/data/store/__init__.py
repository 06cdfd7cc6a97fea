"""The prepared corpus on disk: built once, read by memory map, known by its fingerprint."""
