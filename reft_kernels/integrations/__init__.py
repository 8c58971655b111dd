"""Faces of the engine to other libraries; each imports its library when it is imported itself,
and not before.
"""
