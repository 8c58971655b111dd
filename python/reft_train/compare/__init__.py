"""``compare``: methods on one task and model, each tuned on held-out rows under the same budget,
tested over seeds.
"""
