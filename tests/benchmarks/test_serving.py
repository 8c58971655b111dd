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
    """Providers that answer at once; the list of the traffic that each was asked."""
    found = []

    class Instant:
        def __init__(self, name):
            self.name = name

        def answer(self, requests, concurrency):
            assert all(len(asked.prompt) == 16 for asked in requests)
            found.append((self.name, len({asked.adapter for asked in requests} - {None})))
            return 2.0, [0.001 * n for n in range(1, len(requests) + 1)]

    @contextlib.contextmanager
    def provider(name, args, folders, scratch):
        if name == serving.LORA:
            raise RuntimeError("does not start")
        yield Instant(name)

    monkeypatch.setattr(serving, "_provider", provider)
    return found


FLAGS = ["--quick", "--adapters", "0", "2"]
ROUND = [
    *((serving.PLAIN, 0), (serving.OURS, 0), (serving.PEFT, 0)),
    *((serving.OURS, 2), (serving.PEFT, 2)),
]


def test_a_run_that_was_cut_off_goes_on(model, started, tmp_path, capsys):
    path = tmp_path / "rounds.csv"
    flags = ["--model", str(model), "--csv", str(path), *FLAGS]
    assert serving.main(flags) == 1  # vLLM's LoRA fails, and the others go on
    assert started == [one for one in ROUND for _ in range(2)]  # warm-up, round
    out = capsys.readouterr()
    assert "does not start" in out.err and "transformers with PEFT" in out.out
    lines = path.read_text().splitlines(keepends=True)
    rows = list(csv.DictReader(lines))
    assert [(row["provider"], int(row["adapters"])) for row in rows] == ROUND
    for row in rows:  # 4 tokens each in 2 seconds
        requests = 8 if row["provider"] == serving.PEFT else 16
        assert int(row["requests"]) == requests
        assert float(row["tokens_per_second"]) == 2.0 * requests
        assert float(row["ttft_ms_p50"]) == (requests + 1) / 2
    path.write_text("".join(lines[:-1]))
    started.clear()
    assert serving.main(flags) == 1 and set(started) == {(serving.PEFT, 2)}
    assert path.read_text().splitlines(keepends=True)[:-1] == lines[:-1]


def test_rounds_of_providers_take_turns(model, started, monkeypatch, tmp_path):
    path = tmp_path / "rounds.csv"
    flags = ["--model", str(model), "--csv", str(path), "--requests", "4", "--prompt", "16"]
    only = ["--only", serving.OURS, serving.PEFT, "--adapters", "3", "--rounds", "2"]
    assert serving.main([*flags, *only]) == 0
    rows = [(row["round"], row["provider"]) for row in csv.DictReader(path.open())]
    assert rows == [(n, name) for n in "01" for name in (serving.OURS, serving.PEFT)]


def test_every_adapter_has_a_request(model):
    args = serving.parser().parse_args(["--model", str(model)])
    for count in args.adapters:
        asked = serving._traffic(args, serving.OURS, count, 0)
        assert len({one.adapter for one in asked}) == max(count, 1)
        peft = serving._traffic(args, serving.PEFT, count, 0)
        assert peft == asked[: args.peft_requests]
        # the adapters that PEFT loads
        assert all((one.adapter or 0) < args.peft_requests for one in peft)


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
