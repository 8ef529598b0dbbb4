"""Convert weights: from Alpha-CLIP and LAVIS, to stock classes, adapters merged."""
