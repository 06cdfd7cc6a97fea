"""T5 and mT5: loading, vocabulary, loss, numerics, optimizers."""
