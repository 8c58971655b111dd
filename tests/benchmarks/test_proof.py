"""The proofs' scripts, on a scale that proves nothing but that they run."""

from __future__ import annotations

import pytest

from tests.reft_train.real_data import data_folder, needs

pytestmark = [pytest.mark.full, pytest.mark.slow]


@needs("gsm8k/test.json")
def test_the_causal_proof_trains_interrupts_resumes_and_scores(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    from benchmarks.proof.causal import prove

    found = prove(
        data_folder(),
        tmp_path,
        rows=2,
        seconds=3,
        settings=["--max-steps", "30", "--max-new-tokens", "8"],
    )
    assert found["resumed_losses_are_the_uninterrupted_ones"] and found["steps"] == 30
    assert found["last_loss"] < found["first_loss"]
    assert set(found["loreft"]) == set(found["frozen"]) == {"accuracy", "exact_text"}
