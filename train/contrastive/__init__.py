"""Contrastive training of Alpha-CLIP; used by `train.alpha_clip` only."""
