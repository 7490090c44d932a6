"""Fusion: several policies' parameters mixed into one policy."""
