"""Training: Alpha-CLIP itself by contrast, and language models with an alpha tower."""
