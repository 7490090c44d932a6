"""Training: one LoRA policy per objective."""
