"""Evaluation: predictions of a model on region tasks, and their scores."""
