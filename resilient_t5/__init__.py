"""resilient_t5: a Trainer-free training loop that fine-tunes T5 and mT5 to restore damaged professional text."""

__version__ = "0.1.0"
