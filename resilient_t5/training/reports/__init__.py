"""What a run writes for people: the preview, the lines of its updates, samples and summaries."""
