"""Proofs on real data that the training program does what it says: ``python -m
benchmarks.proof.causal``, ``...boolq``.
"""
