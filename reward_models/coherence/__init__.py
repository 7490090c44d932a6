"""Coherence: is the response whole text that follows from what was said?"""
