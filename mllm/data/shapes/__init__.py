"""Shapes, a dataset of synthetic scenes, and the formats in which it is written to disk."""
