"""``compare``: methods on one task and model, with equal tuning budgets and several seeds."""
