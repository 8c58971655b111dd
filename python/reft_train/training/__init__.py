"""Training: a session from settings to results, the Trainer that it drives, its checkpoints,
callbacks and processes.
"""
