"""One module per command: arguments, call, exit code."""
