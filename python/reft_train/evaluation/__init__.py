"""Evaluation on test sets: generation or classification, scoring, and result files."""
