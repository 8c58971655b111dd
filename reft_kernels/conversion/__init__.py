"""Saved ReFT adapters from one framework's folder to another's; the command is
:mod:`reft_kernels.convert`.
"""
