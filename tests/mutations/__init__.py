"""Mutation testing: `make mutations`, `make mutations-known`."""
