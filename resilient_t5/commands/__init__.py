"""One module per launcher: parse, call, exit code."""
