"""Teach a chat model a style with LoReFT, from a dozen conversations, and compare.

Prints the same questions answered before and after, saves the adapter and loads it into a fresh
model, measures a training step beside pyreft, plain PyTorch and LoRA, and learns a second task with
a held-out score. Writes the adapter, the numbers, a figure and a report.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from reft_train import flags, smollm2
from reft_train.config import RunConfig, validated
from reft_train.errors import UserError, wrong
from reft_train.files import check_folder
from reft_train.tasks.base import Row
from reft_train.tasks.jsonl import Jsonl

STYLE = Path(__file__).with_name("demo_pirate.jsonl")
QUESTIONS = (
    "What is the capital of France?",
    "How do I make a cup of tea?",
    "Who wrote Romeo and Juliet?",
    "What is a volcano?",
    "What should I eat for breakfast?",
    "How do I learn to swim?",
)
DEFAULTS = {"layers": "four", "rank": 4, "positions": "f5+l5", "lr": 2.5e-3, "batch_size": 7}
DEFAULTS |= {"seed": 0, "max_new_tokens": 48}
FIXED = {"task": "jsonl", "architecture": "causal", "max_length": 256}
# settings of the second task, which needs more of the model than a style does
SKILL = {"layers": "all", "rank": 4, "positions": "f5+l5", "lr": 2e-3, "batch_size": 8}


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    text = "teach a chat model a style in a few minutes, and compare"
    command = subparsers.add_parser("demo", help=text, description=__doc__)
    text = "chat model's folder or hub name; none: the packaged SmolLM2-135M-Instruct"
    command.add_argument("--model", metavar="MODEL", help=text)
    text = "conversations, rows of messages (default: pirate speech)"
    command.add_argument("--data", default=str(STYLE), metavar="FILE", help=text)
    count = {"type": flags.number(int, 1), "metavar": "N"}
    command.add_argument("--steps", **count, default=32, help="optimizer steps (default: 32)")
    text = "what to ask before and after (default: six questions)"
    command.add_argument("--ask", nargs="+", default=QUESTIONS, metavar="QUESTION", help=text)
    text = "output folder (default: runs/demo)"
    command.add_argument("--out", default="runs/demo", metavar="FOLDER", help=text)
    text = "two questions, two timed rounds and few docstrings, for a quick check"
    command.add_argument("--quick", action="store_true", help=text)
    flags.add_settings(command, DEFAULTS, DEFAULTS)
    command.set_defaults(run=run)


def read_conversations(path: Path) -> list[Row]:
    """Return a row for each answer of the assistant; see :class:`Jsonl`."""
    from reft_train.data.reading import read_rows

    rows, task = read_rows(path, "--data"), Jsonl()
    for row in rows:
        if "messages" not in row.fields:
            names = ", ".join(map(str, row.fields)) or "none"
            raise wrong(f"--data: {row.where}", f"fields {names}", "messages")
    return [turn for row in rows for turn in task.training_rows(row)]


def adapted(model: Any, tokenizer: Any, config: RunConfig) -> Any:
    """Attach LoReFT to a frozen model."""
    import torch
    from peft import get_peft_model

    from reft_kernels.integrations.peft import ReftConfig, from_chat_template

    torch.manual_seed(config.seed)
    try:
        reft = ReftConfig(
            task_type="CAUSAL_LM",
            layers=config.layers,
            rank=config.rank,
            positions=config.positions,
            response_template=from_chat_template(tokenizer),
        )
        return get_peft_model(model, reft)
    except ValueError as error:
        raise UserError(str(error)) from None


def train(
    model: Any, tokenizer: Any, rows: list[Row], config: RunConfig, steps: int, out: Path
) -> list[float]:
    """Train with transformers' Trainer and return the loss of each step."""
    import transformers

    from reft_train.data.collating import PaddingCollator
    from reft_train.data.tokenizing import iter_items, pad_id

    class Bar(transformers.trainer_callback.ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "loss" in logs and self.training_bar is not None:
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="linear",
        seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
    )
    items = iter_items(rows, Jsonl(), tokenizer, "causal", config.max_length)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[item.columns() for item in items],
        data_collator=PaddingCollator(pad_id(tokenizer)),
    )
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.add_callback(Bar())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"the loss is not finite: {losses}")
    return losses


def answers(
    model: Any, tokenizer: Any, chats: list[list[dict[str, str]]], length: int
) -> list[str]:
    """Return greedy answers to conversations that end with the user."""
    from reft_train.data.tokenizing import prompt_ids
    from reft_train.evaluation.generating import Decode, generate

    form = {"tokenize": False, "add_generation_prompt": True}
    prompts = [tokenizer.apply_chat_template(chat, **form) for chat in chats]
    ids = prompt_ids(prompts, tokenizer, 1024)
    return generate(model, tokenizer, "causal", ids, Decode(length), 16, progress=False)


def skill(model: Any, tokenizer: Any, config: RunConfig, quick: bool, out: Path) -> dict[str, Any]:
    """Train on docstrings; score the frozen model and LoReFT on held-out ones, as chat answers."""
    from reft_train.demo_docstrings import conversation, docstrings, named

    pairs, held_out = docstrings(4, 2) if quick else docstrings(32, 10)
    names = sorted({name for _, name in pairs})
    asked = [conversation(*pair, names)[:-1] for pair in held_out]

    def score() -> float:
        found = answers(model, tokenizer, asked, 8)
        right = [named(own) == name for own, (_, name) in zip(found, held_out, strict=True)]
        return sum(right) / len(right)

    frozen = score()
    rows = [Row({"messages": conversation(*pair, names)}, "docstring") for pair in pairs]
    model = adapted(model, tokenizer, config)
    train(model, tokenizer, rows, config, 4 if quick else 24, out)
    loreft, count = score(), len(held_out)
    spread = [math.sqrt(part * (1 - part) / count) for part in (frozen, loreft)]
    sizes = {"packages": len(names), "texts": count}
    return {"frozen": (frozen, spread[0]), "LoReFT": (loreft, spread[1]), **sizes}


def load(config: RunConfig) -> tuple[Any, Any]:
    """Load the frozen model in the dtype of its files, and its tokenizer."""
    from reft_train import models

    config = config.replace(dtype=smollm2.dtype_of(models.model_config(config)))
    loaded = models.load(config, Jsonl())
    return loaded.model.to(models.pick_device(config)), loaded.tokenizer


def settings(parsed: argparse.Namespace) -> RunConfig:
    """Validate the flags, make the default model's folder, and choose the layers."""
    passed = flags.passed(parsed, DEFAULTS)
    values = {**DEFAULTS, "layers": "all", **FIXED, **passed}
    validated({"model": "none", **values})  # refuses wrong values before a model is made
    from reft_train import models
    from reft_train.training.session import quiet

    quiet()
    model = parsed.model or str(smollm2.unpack(Path(parsed.out) / "model").resolve())
    config = validated({"model": model, **values})
    depth = models.model_config(config).get_text_config().num_hidden_layers
    if "layers" not in passed:  # four, spread over the depth
        config = config.replace(layers=sorted({depth * part // 5 for part in range(1, 5)}))
    if config.layers != "all" and max(config.layers) >= depth:
        raise wrong("--layers", config.layers, f"'all' or numbers below {depth}")
    return config


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if the reloaded adapter answers differently."""
    started, out, quick = time.perf_counter(), Path(parsed.out), parsed.quick
    check_folder(out, "--out")
    rows = read_conversations(Path(parsed.data))
    config = settings(parsed)
    from reft_train import demo_report, demo_steps
    from reft_train.methods import load_adapter, save_adapter

    base, tokenizer = load(config)
    questions = parsed.ask[: 2 if quick else None]
    asked = [[{"role": "user", "content": question}] for question in questions]
    print(f"asking and training: {len(rows)} answers, {parsed.steps} steps", flush=True)
    before = answers(base, tokenizer, asked, config.max_new_tokens)
    model = adapted(base, tokenizer, config)
    losses = train(model, tokenizer, rows, config, parsed.steps, out)
    after = answers(model, tokenizer, asked, config.max_new_tokens)
    save_adapter(model, out / "adapter")
    trained, total = model.get_nb_trainable_parameters()
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    fresh = load_adapter(SimpleNamespace(model=load(config)[0]), out / "adapter")
    same = answers(fresh, tokenizer, asked, config.max_new_tokens) == after
    chats = list(zip(questions, before, after, strict=True))
    reft_config, base = model.peft_config["default"], model.unload()
    del fresh, model
    demo_report.print_chats(chats)
    print("measuring training steps", flush=True)
    measured = demo_steps.measure(base, reft_config, 2 if quick else 5)
    print("a second task, with held-out texts", flush=True)
    scores = skill(base, tokenizer, config.replace(**SKILL), quick, out)
    results = {
        "chats": chats,
        "losses": losses,
        "adapter": {"bytes": size, "trained": trained, "share": trained / (total - trained)},
        "reloaded": same,
        "steps": measured,
        "docstrings": scores,
    }
    seconds = time.perf_counter() - started
    demo_report.write(out, config, results, seconds)
    return 0 if same else 1
