"""Agents: what chooses the weights of the next span, and how it learns."""
