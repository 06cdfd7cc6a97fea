"""Tokenizers: loaded, read from what others published, or trained."""
