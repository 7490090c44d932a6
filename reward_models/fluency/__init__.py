"""Fluency: is the response a sentence that people say?"""
