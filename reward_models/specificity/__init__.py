"""Specificity: could the response have been said to nobody else?"""
