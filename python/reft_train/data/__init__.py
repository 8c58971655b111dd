"""Data of a task: reading files, finding them in folders, tokenizing and batching."""
