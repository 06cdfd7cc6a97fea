"""Scoring of restoration: terms, spans, characters, baselines, and the resilience curve."""
