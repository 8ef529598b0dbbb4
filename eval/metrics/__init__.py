"""Metrics of captions and answers, and their intervals."""
