"""The demo: ``python -m examples.demo``, or ``make demo``."""
