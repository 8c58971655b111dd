"""``search``: hyperparameter optimization with optuna on held-out training rows."""
