"""The drawn world (Shapes): scenes, and the formats in which they are written to disk."""
