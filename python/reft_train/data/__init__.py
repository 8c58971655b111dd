"""Data of a task: files read into rows, found in folders, and made into batches."""
