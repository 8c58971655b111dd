"""examples/encoder_classifier.py on a random encoder."""

from __future__ import annotations

import json

from examples import encoder_classifier


def test_both_classifiers_are_trained_and_scored(tiny_bert, tmp_path, capsys):
    flags = ["--model", str(tiny_bert), "--out", str(tmp_path), "--epochs", "1", "--texts", "8"]
    found = encoder_classifier.main(flags)
    assert list(found) == ["head", "loreft"] and all(0 <= part <= 1 for part in found.values())
    assert "held-out accuracy" in capsys.readouterr().out
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in found]
    assert results[0]["trainable"] == 0 < results[1]["trainable"]
    assert results[0]["head"] == results[1]["head"] > 0
    rows = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert len(rows[0]) == 4 * len(rows[1])
