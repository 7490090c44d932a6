"""Quickstart: a synthetic corpus of our own and the tiny models trained on it."""
