"""Batched inference with results in input order, and generation of answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from reft_train.config import RunConfig
from reft_train.data.collating import PaddingCollator
from reft_train.data.tokenizing import prompt_ids
from reft_train.errors import wrong
from reft_train.models import CAUSAL, bare, evaluating, positions_of
from reft_train.ranks import gathered, joined, place
from reft_train.tasks.base import Decoding

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
    rank, processes = place()
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
    by_index = {i: result for part in gathered(by_index) for i, result in part.items()}
    return [by_index[index] for index in range(len(lengths))]


@dataclass(frozen=True)
class Decode:
    """Generation settings.

    Attributes:
        max_total_tokens: limit of prompt and answer together; None for no limit.
        temperature: 0 for greedy or beam decoding; otherwise tokens are sampled from ``top_p``.
    """

    max_new_tokens: int
    max_total_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 42

    @classmethod
    def of(cls, config: RunConfig, decoding: Decoding, window: int | None = None) -> Decode:
        """Combine a run's settings (which take precedence), the task's, and the context size."""
        limits = [limit for limit in (decoding.max_total_tokens, window) if limit is not None]
        new, total = config.max_new_tokens or decoding.max_new_tokens, min(limits, default=None)
        return cls(new, total, config.temperature, config.top_p, config.num_beams, config.seed)

    def answer_room(self, prompt: int) -> int:
        """Return the number of answer tokens available after a prompt of the given length."""
        total, new = self.max_total_tokens, self.max_new_tokens
        return new if total is None else max(0, min(new, total - prompt))

    def prompt_room(self, max_length: int) -> int:
        """Return the token limit of a prompt: ``max_length``, or less to leave room for the answer.

        The answer gets at most half of the total.
        """
        total, new = self.max_total_tokens, self.max_new_tokens
        return max_length if total is None else min(max_length, total - min(new, total // 2))


def context_window(model: Any, kind: str) -> int | None:
    """Return the context size of a causal model minus a trained prefix, or None if unknown."""
    if kind != CAUSAL:
        return None
    window = positions_of(bare(model).config)
    prefix = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return None if window is None else max(2, window - prefix)


def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, kind: str, decode: Decode, max_length: int
) -> list[list[int]]:
    """Tokenize prompts as in training, cut from the left to leave room for the answer."""
    room = decode.prompt_room(max_length) if kind == CAUSAL else max_length
    return prompt_ids(prompts, tokenizer, room, kind)


def generate(
    model: Any,
    tokenizer: Any,
    kind: str,
    prompts: Sequence[list[int]],
    decode: Decode,
    batch_size: int,
    progress: bool = True,
    title: str = "generating",
) -> list[str]:
    """Generate answers in the order of the prompts.

    Greedy answers do not depend on the batch; sampled ones are reproducible with the same seed and
    batch size. Only generated tokens are decoded, up to the end token and without special tokens.

    Args:
        model: a transformers model or a PeftModel.
        kind: "causal" or "seq2seq".
        prompts: token ids.
    """
    collate = PaddingCollator(tokenizer.pad_token_id, "left" if kind == CAUSAL else "right")
    base, ends = bare(model), [tokenizer.eos_token_id]
    more = getattr(base.generation_config, "eos_token_id", None)
    # the tokenizer's end token, used in training, and the model's
    ends = [*ends, *(more if isinstance(more, list) else [more])]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    # FSDP and DeepSpeed ZeRO-3 shard the weights, so each process takes part in each forward
    sharded = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())

    def forward(batch: list[int]) -> list[str]:
        rooms = [decode.answer_room(len(prompts[index])) for index in batch]
        inputs = collate([{"input_ids": prompts[index]} for index in batch])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        base.generation_config.max_new_tokens = max(1, *rooms)
        output = model.generate(**inputs, synced_gpus=joined() and sharded).cpu()
        # the output repeats a causal prompt, or starts with the decoder's start token
        start = inputs["input_ids"].shape[1] if kind == CAUSAL else 1
        rows = zip(output[:, start:].tolist(), rooms, strict=True)
        return [text(row[:room]) for row, room in rows]

    def text(tokens: list[int]) -> str:
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return tokenizer.decode(tokens[:end], **options)

    lengths = [len(prompt) for prompt in prompts]
    with evaluating(model), _decoding(model, base, tokenizer, decode, ends):
        return run_batches(lengths, batch_size, forward, title, progress)


@contextmanager
def _decoding(
    model: Any, base: Any, tokenizer: Any, decode: Decode, ends: list[int]
) -> Iterator[None]:
    """Replace the model's generation config and the random state, and restore both on exit."""
    before, sampling = base.generation_config, {"do_sample": False}
    if decode.temperature > 0:
        sampling = {"temperature": decode.temperature, "top_p": decode.top_p, "top_k": 0}
        sampling |= {"do_sample": True}
    base.generation_config = GenerationConfig(
        num_beams=decode.num_beams,
        use_cache=True,
        bos_token_id=before.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
        **sampling,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(decode.seed)
            yield
    finally:
        base.generation_config = before
