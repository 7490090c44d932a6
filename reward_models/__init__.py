"""Our trained objectives: one folder each, with the model card and the training script."""
