"""Masking and noise: an example and a key to a source and a target."""
