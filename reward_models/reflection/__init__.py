"""Reflection: does the response give back to this client what this client said and meant?"""
