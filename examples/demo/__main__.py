"""Teach a chat model a style with LoReFT, from a dozen conversations, and compare.

    python -m examples.demo [--model MODEL] [--data FILE] [--steps N] [--quick] [--out FOLDER] ...

Answers the same questions before and after, the latter with the saved adapter in a fresh model,
measures a training step beside pyreft, plain PyTorch and LoRA, and learns a second task with a
held-out score. Adapters are trained and scored as ``reft-train run`` and ``reft-train eval`` do,
here from Python. Writes the adapter, the numbers (``demo.json``) and a figure (``demo.png``).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from peft import PeftModel
from reft_train.config import RunConfig, build
from reft_train.data.reading import read_rows
from reft_train.errors import UserError
from reft_train.evaluation.scoring import score_set
from reft_train.files import check_folder, write_text
from reft_train.models import load, model_config
from reft_train.tasks import get
from reft_train.training.outcome import Outcome
from reft_train.training.prepare import find_rows
from reft_train.training.session import train

from examples.demo import report, smollm2, steps
from examples.demo.docstrings import conversation, docstrings, named

STYLE = Path(__file__).with_name("pirate.jsonl")
QUESTIONS = (
    "What is the capital of France?",
    "How do I make a cup of tea?",
    "Who wrote Romeo and Juliet?",
    "What is a volcano?",
    "What should I eat for breakfast?",
    "How do I learn to swim?",
)
SETTINGS = {"task": "jsonl", "architecture": "causal", "max_length": 256, "accumulation": 1}
SETTINGS |= {"warmup": 0.0, "group_by_length": False, "log_every": 1, "overwrite": True}
# the second task needs more of the model than a style does
SKILL = {"layers": "all", "rank": 4, "positions": "f5+l5", "lr": 2e-3, "batch_size": 8}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags; their values are validated with the other settings."""
    made = argparse.ArgumentParser(
        prog="examples.demo", description="Teach a chat model a style, and compare."
    )
    add = made.add_argument
    add("--model", help="chat model's folder or hub name; none: the packaged SmolLM2-135M-Instruct")
    add("--data", default=str(STYLE), help="conversations, rows of messages (or pirate speech)")
    add("--steps", type=int, default=32, help="optimizer steps (default: 32)")
    add("--ask", nargs="+", default=QUESTIONS, help="what to ask before and after")
    add("--out", default="runs/demo", help="output folder (default: runs/demo)")
    add("--quick", action="store_true", help="two questions, two timed rounds, few docstrings")
    add("--layers", help="such as 0;2;4 (default: four, spread over the depth)")
    add("--rank", default=4, help="(default: 4)")
    add("--positions", default="f5+l5", help="tokens to edit (default: f5+l5)")
    add("--lr", default=2.5e-3, help="(default: 0.0025)")
    add("--batch-size", default=7, help="(default: 7)")
    add("--seed", default=0, help="(default: 0)")
    add("--max-new-tokens", type=int, default=48, help="tokens of an answer (default: 48)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    return made


def answers(model: Any, tokenizer: Any, questions: list[str], length: int) -> list[str]:
    """Return a model's greedy answers."""
    found = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(chat, **template).to(model.device)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(text.strip())
    return found


def trained(config: RunConfig, *callbacks: transformers.TrainerCallback) -> Outcome:
    """Train with the progress bar alone; the log is in ``log.jsonl``."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config, callbacks=callbacks)


class AnswerAtEnd(transformers.TrainerCallback):
    """Keeps the answers of the model as it is at the end of its training, before it is saved."""

    def __init__(self, *asked: Any) -> None:
        self.asked = asked
        self.answers: list[str] = []

    def on_train_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.answers = answers(model.eval(), *self.asked)


def skill(config: RunConfig, quick: bool) -> dict[str, Any]:
    """Train on docstrings; score the frozen model and LoReFT on held-out ones, as chat answers."""
    parts, out = docstrings(4, 2) if quick else docstrings(32, 10), Path(config.output)
    names = sorted({name for _, name in parts[0]})
    for name, part in zip(("train", "test"), parts, strict=True):
        rows = (json.dumps({"messages": conversation(*pair, names)}) for pair in part)
        write_text(out / f"{name}.jsonl", "\n".join(rows))
    files = {"train": str(out / "train.jsonl"), "test": [str(out / "test.jsonl")]}
    config = config.replace(**SKILL, **files, max_new_tokens=8, max_steps=4 if quick else 24)
    task = get("jsonl")
    (rows,) = find_rows(config, task, train=False).tests.values()
    frozen = score_set("docstrings", rows, load(config, task), task, config).predictions
    trained(config)
    lines = (out / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    sizes = {"packages": len(names), "texts": len(rows)}
    return {"frozen": right(frozen), "LoReFT": right(map(json.loads, lines)), **sizes}


def right(predictions: Iterable[dict[str, Any]]) -> float:
    """Return the share of answers that name the right package first."""
    return fmean(named(row["generated"]) == row["answer"] for row in predictions)


def settings(given: argparse.Namespace) -> RunConfig:
    """Validate the flags, make the default model's folder, and choose the layers."""
    names = ("rank", "positions", "lr", "batch_size", "seed", "device")
    values = {name: getattr(given, name) for name in names} | SETTINGS
    values |= {"train": given.data, "output": given.out, "max_steps": given.steps}
    values |= {"skip_test": True, "layers": given.layers or "all"}
    build({"model": "none", **values})  # refuses wrong values before a model is made
    check_folder(Path(given.out), "--out")
    read_rows(Path(given.data), "--data")
    model = given.model or str(smollm2.unpack(Path(given.out) / "model").resolve())
    config = build({"model": model, **values})
    hf_config = model_config(config)
    depth = hf_config.get_text_config().num_hidden_layers
    if given.layers is None:  # four, spread over the depth
        config = config.replace(layers=sorted({depth * part // 5 for part in range(1, 5)}))
    return config.replace(dtype=smollm2.dtype_of(hf_config))


def run(given: argparse.Namespace) -> int:
    """Run the demo. Returns 0, or 1 if the saved adapter answers otherwise than the trained one."""
    started, out, length = time.perf_counter(), Path(given.out), given.max_new_tokens
    config = settings(given)
    questions = list(given.ask[: 2 if given.quick else None])
    loaded = load(config, get("jsonl"))
    tokenizer, base = loaded.tokenizer, loaded.model.eval()
    print(f"asking and training: {given.steps} steps", flush=True)
    before = answers(base, tokenizer, questions, length)
    at_end = AnswerAtEnd(tokenizer, questions, length)
    outcome = trained(config, at_end)
    model = PeftModel.from_pretrained(base, out / "adapter").eval()
    after = answers(model, tokenizer, questions, length)
    chats = list(zip(questions, before, after, strict=True))
    report.print_chats(chats)
    print("measuring training steps", flush=True)
    reft_config = model.peft_config["default"]
    measured = steps.measure(model.unload(), reft_config, 2 if given.quick else 5)
    print("a second task, with held-out texts", flush=True)
    scores = skill(config.replace(output=str(out / "docstrings"), skip_test=False), given.quick)
    losses = [loss for _, loss in outcome.losses]
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    share = outcome.trainable / outcome.total
    adapter = {"bytes": size, "trained": outcome.trainable, "share": share}
    results = {"chats": chats, "losses": losses, "adapter": adapter}
    same = after == at_end.answers
    report.write(out, {**results, "reloaded": same, "steps": measured, "docstrings": scores})
    print(f"{time.perf_counter() - started:.0f} s; to talk to it: make chat", flush=True)
    return 0 if same else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns :func:`run`'s code, or 2 for bad input, told in one line."""
    try:
        return run(parser().parse_args(arguments))
    except UserError as error:
        print(f"examples.demo: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
