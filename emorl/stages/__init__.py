"""Stages: the command `emorl X` is `emorl/stages/X.py`. Only they open, name and finish a run directory.

A module here imports no torch, so that a cheap mistake is answered at once; what works is imported where it is used.
"""
