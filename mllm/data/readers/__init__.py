"""Readers: one module per file format; each yields `RegionSample`s."""
