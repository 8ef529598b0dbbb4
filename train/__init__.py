"""Training: the tuning of language models with an alpha tower."""
