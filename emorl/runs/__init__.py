"""Run directories: what they hold, how they are written, and how a stage says what it is doing."""
