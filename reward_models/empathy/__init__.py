"""Empathy: does the response react to, interpret and explore what this person feels?"""
