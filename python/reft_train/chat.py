"""``chat``: talk to a model with an adapter in the terminal, or with its frozen base."""

from __future__ import annotations

import argparse
import contextlib
from types import SimpleNamespace
from typing import Any

from reft_train import flags, smollm2
from reft_train.config import validated
from reft_train.errors import wrong

SETTINGS = ("model", "device", "max_new_tokens", "temperature", "seed")
DEFAULTS = {"model": None, "max_new_tokens": 200, "temperature": 0.0, "seed": 42}
DEFAULTS |= {"device": "auto"}
HELP = "/base: the frozen model, /adapter: the adapter again, /reset: forget, /quit: leave"
DESCRIPTION = f"""Answers stream to the terminal; lines may also be piped in. {HELP}."""

Messages = list[dict[str, str]]


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    text = "talk to a model with an adapter in the terminal"
    command = subparsers.add_parser("chat", help=text, description=DESCRIPTION)
    text = "the adapter's folder"
    command.add_argument("--adapter", required=True, metavar="FOLDER", help=text)
    flags.add_settings(command, SETTINGS, DEFAULTS)
    command.set_defaults(run=run)


def reply(model: Any, tokenizer: Any, messages: Messages, length: int, **sampling: Any) -> str:
    """Stream the answer to a conversation to the standard output, and return it.

    The whole conversation is the prompt, so an adapter edits tokens of all of it.

    Raises:
        UserError: the conversation does not fit the model.
    """
    import torch
    from transformers import TextStreamer

    template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, **template).to(model.device)
    size = inputs["input_ids"].shape[1]
    window = model.config.get_text_config().max_position_embeddings
    if size + length > window:
        raise wrong("chat", f"{size} tokens and {length} to come", f"{window} in all: /reset")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=length, streamer=streamer, **sampling)
    return tokenizer.decode(tokens[0, size:], skip_special_tokens=True)


def converse(model: Any, tokenizer: Any, length: int, **sampling: Any) -> None:
    """Read lines until /quit or the end of the input, and answer each."""
    from rich.console import Console

    from reft_train.errors import UserError

    console, messages, adapted = Console(highlight=False), [], True
    console.print(HELP, style="dim", markup=False)
    while True:
        try:
            line = console.input("[bold]you[/]: ").strip()
        except EOFError:
            return console.print()
        if line == "/quit":
            return None
        if line == "/reset":
            messages = []
        elif line in ("/base", "/adapter"):
            adapted = line == "/adapter"
        elif line.startswith("/"):
            console.print(f"{line}: unknown. {HELP}", style="red", markup=False)
        elif line:
            messages.append({"role": "user", "content": line})
            console.print("with LoReFT" if adapted else "frozen", style="bold", end=": ")
            context = contextlib.nullcontext() if adapted else model.disable_adapter()
            try:
                with context:
                    answer = reply(model, tokenizer, messages, length, **sampling)
            except (UserError, KeyboardInterrupt) as error:
                console.print(str(error) or "interrupted", style="red", markup=False)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def run(parsed: argparse.Namespace) -> int:
    """Run the command."""
    from reft_train.evaluate import resolve_adapter
    from reft_train.files import read_object

    parsed.run_folder = None
    folder = resolve_adapter(parsed)
    if folder is None:
        raise wrong("--adapter", "none", "an adapter's folder")
    values = {**DEFAULTS, "task": "jsonl", "architecture": "causal"}
    values["model"] = read_object(folder / "adapter_config.json", "--adapter").get(
        "base_model_name_or_path"
    )
    config = validated(values | flags.passed(parsed, SETTINGS))
    import torch

    from reft_train import models
    from reft_train.methods import check_base, load_adapter
    from reft_train.tasks.jsonl import Jsonl
    from reft_train.training.session import quiet

    quiet()
    hf_config = models.model_config(config)
    check_base(hf_config, folder)
    loaded = models.load(config.replace(dtype=smollm2.dtype_of(hf_config)), Jsonl())
    if loaded.tokenizer.chat_template is None:
        raise wrong("--model", f"{config.model}, without a chat template", "a chat model")
    model = load_adapter(SimpleNamespace(model=loaded.model), folder)
    torch.manual_seed(config.seed)
    sampling: dict[str, Any] = {"do_sample": config.temperature > 0}
    if config.temperature > 0:
        sampling["temperature"] = config.temperature
    model = model.to(models.pick_device(config)).eval()
    converse(model, loaded.tokenizer, config.max_new_tokens, **sampling)
    return 0
