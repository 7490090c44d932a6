"""Fusion methods, one file a family; each file ends with the entries that `emorl/fusion/operators.py` lists.

`linear` linear, task_arithmetic, keep · `spherical` slerp · `model_stock` · `ties` · `dare` dare_linear, dare_ties
"""
