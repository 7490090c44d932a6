"""An objective that asks a chat model, by a rubric in words."""
