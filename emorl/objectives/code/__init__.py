"""An objective that runs the completion's code in a sandbox."""
