"""Policies: one base model and LoRA adapters, and the only place a prompt is rendered."""
