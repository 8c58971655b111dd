"""``search``: hyperparameters by optuna, chosen on held-out training rows."""
