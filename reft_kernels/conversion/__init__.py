"""Conversion of saved ReFT adapters between frameworks.

The command line interface is :mod:`reft_kernels.convert`.
"""
