import pytest

pytest.importorskip("optuna", reason="the package optuna is not installed")
