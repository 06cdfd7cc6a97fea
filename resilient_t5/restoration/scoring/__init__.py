"""How well a model restores: terms, spans, characters, baselines, and the curve over damage."""
