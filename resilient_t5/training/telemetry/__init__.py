"""What a run records as it goes: metrics.jsonl, TensorBoard, the console, times, plots."""
