"""End-to-end checks of the training program on real data.

Run ``python -m benchmarks.proof.causal`` or ``python -m benchmarks.proof.boolq``.
"""
