"""Named parts on disk, whole or absent; knows nothing of models or data."""
