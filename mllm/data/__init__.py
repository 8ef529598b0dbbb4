"""Reads datasets as `RegionSample`s and writes the region index that training reads."""
