"""``chat``: talk to a model with an adapter in the terminal, or with its frozen base."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from reft_train import flags
from reft_train.commands import CHAT_HELP as HELP
from reft_train.commands import ChatOptions
from reft_train.config import RunConfig, validated
from reft_train.errors import UserError, wrong

Messages = list[dict[str, str]]


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
    import torch

    from reft_train import methods, models
    from reft_train.evaluate import adapter_folder
    from reft_train.tasks.jsonl import Jsonl
    from reft_train.training.session import quiet

    options = flags.options(parsed, ChatOptions)
    folder = adapter_folder(options.adapter)
    if folder is None:
        raise wrong("--adapter", "none", "an adapter's folder")
    base = {"model": options.model or methods.base_model(folder), "task": "jsonl"}
    base |= {"architecture": "causal", "device": options.device, "seed": options.seed}
    config = validated(RunConfig, base)
    quiet()
    hf_config = models.model_config(config)
    methods.check_base(hf_config, folder)
    saved = str(getattr(hf_config, "dtype", None)).removeprefix("torch.")
    if saved in ("float32", "bfloat16", "float16"):
        config = config.replace(dtype=saved)
    loaded = models.load(config, Jsonl())
    tokenizer, temperature = loaded.tokenizer, options.temperature
    if tokenizer.chat_template is None:
        raise wrong("--model", f"{config.model}, without a chat template", "a chat model")
    model = methods.load_adapter(loaded, folder).to(models.pick_device(config)).eval()
    torch.manual_seed(config.seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    converse(model, tokenizer, options.max_new_tokens, **{"do_sample": False, **sampling})
    return 0
