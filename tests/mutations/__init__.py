"""Mutations of the sources, and whether the tests notice them: `make mutations`, `make mutations-known`."""
