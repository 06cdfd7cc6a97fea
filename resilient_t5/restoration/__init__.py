"""Filling gaps in text and measuring how well it was done."""
