"""Batched inference with results in input order, and generation of answers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import GenerationConfig

from reft_train.config import RunConfig
from reft_train.data.collating import PaddingCollator
from reft_train.data.tokenizing import Encoder
from reft_train.errors import wrong
from reft_train.models import CAUSAL, bare, evaluating, positions_of

Result = TypeVar("Result")


def run_batches(
    lengths: Sequence[int],
    batch_size: int,
    forward: Callable[[list[int]], Sequence[Result]],
    title: str,
    progress: bool = True,
) -> list[Result]:
    """Run ``forward`` on all inputs and return the results in input order.

    The longest inputs run first, so that out-of-memory errors occur early. Under torch.distributed
    each process takes every n-th input, and all processes receive all results.

    Args:
        lengths: tokens of each input.
        forward: maps the indices of a batch to one result per input.
    """
    rank, processes = PartialState().process_index, PartialState().num_processes
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    indices = order[rank::processes]
    if len(indices) < -(-len(order) // processes):
        # sharded models need the same number of forwards on every process
        indices = [*indices, order[0]]
    by_index: dict[int, Result] = {}
    every = 0.2 if sys.stderr.isatty() else 10.0  # seconds
    options = {"desc": title, "disable": not progress or rank > 0, "mininterval": every}
    with tqdm(total=len(indices), unit="row", maxinterval=every, **options) as shown:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            try:
                results = forward(batch)
            except torch.OutOfMemoryError:
                longest = max(lengths[index] for index in batch)
                what = f"{batch_size}, which exceeds the GPU's memory with {longest} tokens a row"
                raise wrong("eval_batch_size", what, "less") from None
            by_index.update(zip(batch, results, strict=True))
            shown.update(len(batch))
    by_index = dict(gather_object(list(by_index.items())))
    return [by_index[index] for index in range(len(lengths))]


def context_window(model: Any, kind: str) -> int | None:
    """Return the context size of a causal model minus a trained prefix, or None if unknown."""
    if kind != CAUSAL:
        return None
    window = positions_of(bare(model).config)
    prefix = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return None if window is None else max(2, window - prefix)


def generate(
    model: Any,
    encoder: Encoder,
    texts: Sequence[str],
    config: RunConfig,
    title: str = "generating",
    progress: bool = True,
) -> list[str]:
    """Generate an answer to each prompt, as the settings say, else as the encoder's task does.

    Prompts are tokenized as in training, cut from the left to leave room for the answer. Greedy
    answers do not depend on the batch; sampled ones are reproducible with the same seed and batch
    size. Only generated tokens are decoded, up to the end token and without special tokens.

    Args:
        model: a transformers model or a PeftModel.
    """
    tokenizer, causal, decoding = encoder.tokenizer, encoder.kind == CAUSAL, encoder.task.decoding
    new = config.max_new_tokens or decoding.max_new_tokens
    limits = (decoding.max_total_tokens, context_window(model, encoder.kind))
    total = min((limit for limit in limits if limit is not None), default=sys.maxsize)
    # the answer gets at most half of the total
    longest = total - min(new, total // 2) if causal else config.max_length
    prompts = encoder.prompts(texts, min(config.max_length, longest))
    rooms = [max(0, min(new, total - len(prompt))) for prompt in prompts]
    collate = PaddingCollator(tokenizer.pad_token_id, "left" if causal else "right")
    own = bare(model).generation_config
    # the tokenizer's end token, used in training, and the model's
    more = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = {token for token in (tokenizer.eos_token_id, *more) if token is not None}
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        sampling |= {"do_sample": True}
    settings = GenerationConfig(
        num_beams=config.num_beams,
        use_cache=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        **sampling,
    )
    # FSDP and DeepSpeed ZeRO-3 shard the weights, so each process takes part in each forward
    sharded = PartialState().use_distributed and any(
        hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()
    )

    def forward(batch: list[int]) -> list[str]:
        inputs = collate([{"input_ids": prompts[index]} for index in batch])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        settings.max_new_tokens = max(1, *(rooms[index] for index in batch))
        output = model.generate(**inputs, synced_gpus=sharded).cpu()
        # the output repeats a causal prompt, or starts with the decoder's start token
        start = inputs["input_ids"].shape[1] if causal else 1
        rows = zip(output[:, start:].tolist(), batch, strict=True)
        return [text(row[: rooms[index]]) for row, index in rows]

    def text(tokens: list[int]) -> str:
        answer = itertools.takewhile(lambda token: token not in ends, tokens)
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return tokenizer.decode(list(answer), **options)

    lengths = [len(prompt) for prompt in prompts]
    with evaluating(model), _decoding(model, settings, config.seed):
        return run_batches(lengths, config.eval_batch_size, forward, title, progress)


@contextmanager
def _decoding(model: Any, settings: GenerationConfig, seed: int) -> Iterator[None]:
    """Replace the model's generation config and the random state, and restore both on exit."""
    base = bare(model)
    before, base.generation_config = base.generation_config, settings
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        base.generation_config = before
