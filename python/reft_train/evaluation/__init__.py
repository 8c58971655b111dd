"""Scores of a model on test sets: answers generated or classes predicted, the task's rule
applied, tables written.
"""
