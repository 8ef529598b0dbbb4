"""Recipes and flags of the two training commands, checked before torch is imported."""
