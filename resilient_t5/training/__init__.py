"""The loop and everything that moves in it."""
