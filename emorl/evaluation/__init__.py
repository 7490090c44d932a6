"""Evaluation: models times prompts times objectives become tables, fronts and indicators."""
