"""Spaces of candidates: weights, fusion settings, merging maps."""
