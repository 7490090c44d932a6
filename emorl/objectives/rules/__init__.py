"""Objectives that are rules over words and the data's columns."""
