"""Engines: what writes text with several models whose weights may change after every span."""
