"""The configuration: one dataclass for each section, the checks over them, and how it is read and printed."""
