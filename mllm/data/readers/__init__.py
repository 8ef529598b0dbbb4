"""Readers: one module for each file format, each yielding `RegionSample` records."""
