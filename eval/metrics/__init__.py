"""One metric a file; each takes predictions and references, never a model."""
