"""``doctor``: environment report, memory estimate for a model, and a short trial training."""
