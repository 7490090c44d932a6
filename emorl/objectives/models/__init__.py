"""Objectives that ask a model: classifiers, language models, sentence encoders."""
