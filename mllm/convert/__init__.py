"""Conversion of weights: from Alpha-CLIP and LAVIS, to stock classes, and merging of adapters."""
