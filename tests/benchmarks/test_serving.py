"""The benchmark of serving: its plan, its rows, and resuming; no server is started."""

from __future__ import annotations

import contextlib
import csv

import pytest
import transformers

from benchmarks import serving, serving_adapters


@pytest.fixture
def model(tmp_path):
    """A folder with the configuration of a small Llama and its weights."""
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def started(monkeypatch):
    """Providers that answer at once; the list of those that were started."""
    found = []

    class Instant:
        def answer(self, requests, concurrency):
            assert all(len(asked.prompt) == 16 for asked in requests)
            return 2.0, [0.001 * n for n in range(1, len(requests) + 1)]

    @contextlib.contextmanager
    def provider(name, count, args, folders, scratch):
        if name == serving.LORA:
            raise RuntimeError("does not start")
        found.append((name, count))
        yield Instant()

    monkeypatch.setattr(serving, "_provider", provider)
    return found


def test_a_run_that_was_cut_off_goes_on(model, started, tmp_path, capsys):
    path = tmp_path / "rounds.csv"
    flags = ["--model", str(model), "--quick", "--csv", str(path), "--adapters", "0", "2"]
    assert serving.main(flags) == 1  # vLLM's LoRA fails, and the others go on
    ours = (serving.OURS, serving.PEFT)
    want = [(serving.PLAIN, 0), *((name, 0) for name in ours), *((name, 2) for name in ours)]
    assert started == want and "does not start" in capsys.readouterr().err
    lines = path.read_text().splitlines(keepends=True)
    rows = list(csv.DictReader(lines))
    assert [(row["provider"], int(row["adapters"])) for row in rows] == want
    assert all(float(row["tokens_per_second"]) == 32.0 for row in rows)  # 16 requests, 4 tokens
    assert all(float(row["ttft_ms_p50"]) == 8.5 for row in rows)
    path.write_text("".join(lines[:-1]))
    started.clear()
    assert serving.main(flags) == 1 and started == [(serving.PEFT, 2)]
    assert path.read_text().splitlines(keepends=True)[:-1] == lines[:-1]


def test_adapters_take_turns(model):
    from benchmarks.serving_clients import traffic

    asked = traffic(model, 6, 4, 8, 2, seed=0)
    assert [one.adapter for one in asked] == [0, 1, 2, 3, 0, 1]
    assert len({one.prompt for one in asked}) == 6
    assert all(one.adapter is None for one in traffic(model, 3, 0, 8, 2, seed=0))


def test_adapter_folders_load_and_differ(model, tmp_path):
    import peft
    import torch

    folders = serving_adapters.Folders(model, tmp_path, 4)
    ids = torch.arange(20, 40)[None]
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    logits = [base(ids).logits]
    for kind in (folders.reft(2), folders.lora(1)):
        for folder in kind.values():
            fresh = transformers.AutoModelForCausalLM.from_pretrained(model)
            logits.append(peft.PeftModel.from_pretrained(fresh, folder).eval()(ids).logits)
    for number, one in enumerate(logits):
        assert not any(torch.equal(one, other) for other in logits[:number])
