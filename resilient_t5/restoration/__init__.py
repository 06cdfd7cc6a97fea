"""Fill gaps in text and measure restoration."""
