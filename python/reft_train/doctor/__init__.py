"""``doctor``: what is installed, whether a model and its settings fit this machine, and a trial
of a few steps.
"""
