"""Aggregation: several policies mixed while decoding."""
