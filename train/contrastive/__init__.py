"""Contrastive training of Alpha-CLIP: what only `train.alpha_clip` needs."""
