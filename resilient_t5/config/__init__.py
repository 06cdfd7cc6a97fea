"""Configuration: one frozen dataclass per section; parsing, checks and reference."""
