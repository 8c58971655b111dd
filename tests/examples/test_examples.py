"""Each program in examples/ runs on a tiny model, trains what it shows and prints what it promises."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.tiny_chat import chat_tokenizer, save_chat_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """A random Llama whose layers are as wide as a block of bitsandbytes' 4 bits."""
    return str(save_chat_model(tmp_path_factory.mktemp("chat"), hidden_size=64))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("encoder"), chat_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a program as ``python examples/NAME ARGUMENTS`` and return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(text: str) -> list[float]:
    """Return the numbers of the line "loss: [...]"."""
    return [float(number) for number in re.findall(r"[\d.]+", re.search(r"loss: \[.*\]", text)[0])]


def learned(text: str) -> bool:
    values = losses(text)
    return values[-1] < values[0]


@pytest.mark.parametrize("options", [(), ("--packing",)], ids=["padded", "packed"])
def test_sft(run, chat_model, options):
    pytest.importorskip("trl", reason="needs the package trl")
    text = run("sft_trl.py", chat_model, "--steps", 10, *options)
    assert learned(text) and Path("runs/examples/sft/adapter_model.safetensors").is_file()


def test_dpo(run, chat_model):
    pytest.importorskip("trl", reason="needs the package trl")
    text = run("dpo_trl.py", chat_model, "--steps", 8)
    margins = [float(number) for number in re.findall(r"margin (-?[\d.]+)", text)]
    assert margins[0] == 0 < margins[-1]


def test_grpo(run, chat_model):
    pytest.importorskip("trl", reason="needs the package trl")
    text = run("grpo_trl.py", chat_model, "--steps", 3)
    assert 0 <= float(re.search(r"mean reward: \[([\d.]+)\]", text)[1]) <= 1
    assert Path("runs/examples/grpo/adapter_config.json").is_file()


def test_reward_model(run, chat_model):
    pytest.importorskip("trl", reason="needs the package trl")
    text = run("reward_model.py", chat_model, "--steps", 6)
    found = [float(number) for number in re.findall(r"loss ([\d.]+)", text)]
    assert found[-1] < found[0]


def test_lm_eval_scores_the_adapter_and_the_frozen_model(run, chat_model):
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    run("load_adapter.py", chat_model, "--steps", 10)
    text = run("lm_eval_adapter.py", chat_model, "runs/examples/adapter")
    frozen, adapted = re.findall(r"^(?:frozen|adapter) \[.*?\] (\[.*\])$", text, re.MULTILINE)
    assert frozen != adapted


def test_four_bits(run, chat_model):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    text = run("quantized_4bit.py", chat_model, "--steps", 5)
    assert learned(text) and "loaded identical: True" in text


@pytest.mark.parametrize(
    "name", ["trainer.py", "accelerate_loop.py", "lora_and_reft.py"], ids=lambda name: name[:-3]
)
def test_training_loops(run, chat_model, name):
    count = ("--epochs" if name == "accelerate_loop.py" else "--steps", 8)
    text = run(name, chat_model, *count)
    assert learned(text) and list(Path("runs/examples").glob("*/adapter_model.safetensors"))
    if name == "lora_and_reft.py":
        assert "loaded identical: True" in text


def test_composition(run, chat_model):
    text = run("composition.py", chat_model, "--steps", 18)
    assert learned(text) and Path("runs/examples/composition/adapter_config.json").is_file()
    modes = re.findall(r"^(\w+): Ahoy (\d), star (\d) of 7", text, re.MULTILINE)
    assert [mode for mode, *_ in modes] == ["base", "ahoy", "star", "both"]
    assert modes[0][1:] == ("0", "0")  # no column: the frozen model


def test_loading_in_four_ways(run, chat_model):
    text = run("load_adapter.py", chat_model, "--steps", 6)
    first, further = (
        [float(number) for number in re.findall(r"[\d.]+", line)]
        for line in re.findall(r"steps: \[(.*)\]", text)
    )
    assert further[0] < first[-1] < first[0]  # training goes on where it ended
    answers = text.strip().splitlines()[-1]
    texts = ast.literal_eval(answers)
    assert len(texts) == 3 and len(set(texts)) == 1


def test_memorising(run, chat_model):
    text = run("memorising.py", chat_model, "--layer", 1, "--steps", 60, "--rank", 8)
    first, *_, last = (float(number) for number in re.findall(r"loss ([\d.]+)", text))
    assert last < first


def test_publishing(run, chat_model):
    text = run("publish.py", chat_model)
    assert "loads again: True" in text and "adapter_model.safetensors" in text


def test_classification(run, encoder):
    text = run("classification.py", encoder, "--epochs", 10)
    assert learned(text)
    accuracy, loaded = re.findall(r"(?:accuracy|loaded): ([\d.]+)", text)
    assert accuracy == loaded


def test_examples_are_short_and_listed():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path.name
        assert f"examples/{path.name}" in page, path.name
