"""The corpus: files in any format and encoding to documents, and the built-in sample."""
