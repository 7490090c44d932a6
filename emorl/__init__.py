"""Fine-tune a language model towards several objectives at once and steer between them (EMORL, arXiv 2505.02579)."""
