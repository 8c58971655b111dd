"""Training sessions, with their Trainer, checkpoints, callbacks and process groups."""
