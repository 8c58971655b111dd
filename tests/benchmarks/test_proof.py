"""Tests of the end-to-end scripts with few rows and steps."""

from __future__ import annotations

import pytest

from tests.reft_train.real_data import data_folder, needs

pytestmark = [pytest.mark.full, pytest.mark.slow]


@needs("gsm8k/test.json")
def test_the_causal_proof_trains_interrupts_resumes_and_scores(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    from benchmarks.proof.causal import prove

    results = prove(
        data_folder(),
        tmp_path,
        rows=2,
        seconds=3,
        settings=["--max-steps", "30", "--max-new-tokens", "8"],
    )
    assert results["resumed_losses_are_the_uninterrupted_ones"] and results["steps"] == 30
    assert results["last_loss"] < results["first_loss"]
    assert set(results["loreft"]) == set(results["frozen"]) == {"accuracy", "exact_text"}
