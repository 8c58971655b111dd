"""Tokenization of a task's rows into input ids and labels, as a cached data set or a stream.

Prompt and target are tokenized separately, so that prompt tokens are the same in generation:

    causal          prompt = BOS + text, labels -100;   target = text + EOS, learned
    seq2seq         input_ids = the prompt with its special tokens;   labels = text + EOS
    classification  input_ids = the tokenizer's encoding of a text or a pair;   labels = a number
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reft_train.data.reading import existing_file, iter_rows
from reft_train.errors import UserError, one_line, wrong
from reft_train.tasks.base import Classified, Example, Row, Task

if TYPE_CHECKING:
    import datasets

IGNORED = -100  # label ignored by the loss
_FORMAT = 6  # version of the cached format; part of every key
_CHUNK = 1000  # rows tokenized per batch; fast tokenizers use several threads for a batch


class Item(NamedTuple):
    """One example as token ids.

    ``cut_prompt`` and ``cut_target`` count tokens that did not fit. ``lost`` is True if truncation
    left nothing but special tokens of the prompt or the target.
    """

    input_ids: list[int]
    labels: list[int] | int | float
    token_type_ids: list[int] | None = None
    cut_prompt: int = 0
    cut_target: int = 0
    lost: bool = False

    def columns(self) -> dict[str, Any]:
        """Return what a batch needs."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        return {"input_ids": self.input_ids, "labels": self.labels, **types}


class Prompt(NamedTuple):
    """Tokens of a prompt's text, and the special tokens before and after it."""

    before: list[int]
    body: list[int]
    after: list[int]

    @property
    def length(self) -> int:
        return sum(map(len, self))

    def cut_to(self, room: int) -> list[int]:
        """Return ``room`` tokens, without those at the start of the text.

        At least the first token before the text is kept.
        """
        room -= len(self.after)
        if room < 1:
            raise wrong("max_length", room + len(self.after), f"at least {len(self.after) + 1}")
        before = self.before[:room]
        return before + self.body[max(0, len(self.body) - (room - len(before))) :] + self.after


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of a task for a model of ``kind``: causal, seq2seq or classification.

    The target is kept and the prompt is cut from the left, after its BOS. A target that does not
    fit next to one prompt token is cut at its end, before its EOS. Prompt and target of an
    encoder-decoder have ``max_length`` tokens each. For a pair to classify, the longer text is cut
    first.
    """

    task: Task
    tokenizer: Any
    kind: str
    max_length: int

    def read(self, row: Row) -> Example | Classified:
        """Return what the task makes of a row for this kind of model."""
        if self.kind == "classification":
            return self.task.classified(row)
        return self.task.example(row, self.tokenizer)

    def items(self, rows: Iterable[Row], chunk: int = 1) -> Iterator[Item]:
        """Lazily yield an item for each row, including lost ones, ``chunk`` rows at a time."""
        rows = iter(rows)
        while taken := list(itertools.islice(rows, chunk)):
            yield from self.encode([self.read(row) for row in taken], [row.where for row in taken])

    def encode(
        self, examples: Sequence[Any], locations: Sequence[str | None] | None = None
    ) -> list[Item]:
        """Encode what :meth:`read` returns.

        Args:
            locations: location of each row for error messages.
        """
        if self.max_length < 2:
            raise wrong("max_length", self.max_length, "at least 2")
        locations = locations or [None] * len(examples)
        if self.kind == "classification":
            return list(map(self._classified, examples, locations))
        for example, where in zip(examples, locations, strict=True):
            if not example.target.strip():
                raise _empty("target", example.target, where)
        prompts = self._prompts([example.prompt for example in examples], locations)
        targets = self._targets([example.target for example in examples])
        return [self._joined(*pair) for pair in zip(prompts, targets, strict=True)]

    def prompts(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Tokenize prompts for generation as in training, each cut from the left."""
        prompts = self._prompts(texts, [None] * len(texts))
        return [prompt.cut_to(max_length) for prompt in prompts]

    def _classified(self, classified: Classified, where: str | None) -> Item:
        pair = (classified.text, classified.pair)
        texts = [text for text in pair if text is not None]
        encoded = self.tokenizer(*texts, verbose=False)
        full = len(encoded["input_ids"])
        if full == 0:
            raise _empty("text", classified.text, where)
        if full > self.max_length:
            limit = {"truncation": "longest_first", "max_length": self.max_length}
            encoded = self.tokenizer(*texts, **limit)
        ids, types = encoded["input_ids"], encoded.get("token_type_ids")
        return Item(ids, classified.label, types, full - len(ids))

    def _joined(self, prompt: Prompt, whole: list[int]) -> Item:
        causal = self.kind == "causal"
        room = self.max_length - causal  # a causal prompt keeps one token next to its target
        target = whole if len(whole) <= room else [*whole[: room - 1], whole[-1]]
        ids = prompt.cut_to(self.max_length - causal * len(target))
        cuts = prompt.length - len(ids), len(whole) - len(target)
        no_prompt = cuts[0] > 0 and len(ids) - len(prompt.after) <= max(len(prompt.before), 1)
        lost = no_prompt or (cuts[1] > 0 and len(target) == 1)
        if causal:
            return Item(ids + target, [IGNORED] * len(ids) + target, None, *cuts, lost)
        return Item(ids, target, None, *cuts, lost)

    def _prompts(self, texts: Sequence[str], locations: Sequence[str | None]) -> list[Prompt]:
        encoded = self.tokenizer(list(texts), return_special_tokens_mask=True, verbose=False)
        rows = encoded["input_ids"], encoded["special_tokens_mask"]
        return [self._prompt(*parts) for parts in zip(texts, locations, *rows, strict=True)]

    def _prompt(self, text: str, where: str | None, ids: list[int], special: list[int]) -> Prompt:
        """Split a prompt's tokens. A BOS that the chat template has written is not repeated."""
        places = [place for place, mark in enumerate(special) if not mark] or [len(ids)]
        start, stop = places[0], places[-1] + 1
        before, body, after = ids[:start], ids[start:stop], ids[stop:]
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos) and body[:1] == [self.tokenizer.bos_token_id]:
            before, body = body[:1], body[1:]
        if not text.strip() or not body:
            raise _empty("prompt", text, where)
        return Prompt(before, body, after if self.kind == "seq2seq" else [])

    def _targets(self, texts: Sequence[str]) -> list[list[int]]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            what = f"a {type(self.tokenizer).__name__} without an EOS token"
            raise wrong("tokenizer", what, "one: it ends an answer")
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [row if row[-1:] == [eos] else [*row, eos] for row in rows]


def tokenize_rows(
    rows: Sequence[Row], encoder: Encoder, key: dict[str, Any], folder: Path | None = None
) -> datasets.Dataset:
    """Tokenize all rows that are not lost (see :class:`Item`), or load them from the cache.

    The data set has the columns of :meth:`Item.columns`, ``length``, and the cut tokens.

    Args:
        key: identifies the rows; see :func:`cached`.
    """
    if not rows:
        raise wrong("data", "no rows", "at least one")

    def items() -> Iterator[dict[str, Any]]:
        lost = 0
        for item in encoder.items(rows, _CHUNK):
            lost += item.lost
            if not item.lost:
                cuts = {"cut_prompt": item.cut_prompt, "cut_target": item.cut_target}
                yield {**item.columns(), "length": len(item.input_ids), **cuts}
        if lost == len(rows):
            raise all_lost(encoder.max_length)

    settings = {"kind": encoder.kind, "max_length": encoder.max_length}
    settings["tokenizer"] = tokenizer_digest(encoder.tokenizer)
    return cached(items, {**key, "task": encoder.task.name, **settings}, folder)


def cached(
    items: Callable[[], Iterable[dict[str, Any]]],
    parts: Mapping[str, object],
    folder: Path | None = None,
) -> datasets.Dataset:
    """Return the data set of ``items()``, memory-mapped from the cache of ``datasets``.

    Args:
        parts: everything the data depend on, as JSON-serializable values.
        folder: cache folder. None: that of ``datasets``.
    """
    import datasets
    from datasets.fingerprint import Hasher

    key = Hasher.hash(json.dumps({"format": _FORMAT, **parts}, sort_keys=True))
    place = (folder or Path(datasets.config.HF_DATASETS_CACHE)) / f"reft-train-{key}"
    try:
        return datasets.Dataset.from_generator(items, cache_dir=str(place), fingerprint=key)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        what = f"{place}, which cannot be read or written ({one_line(cause)})"
        raise wrong("cache", what, "a writable folder; a damaged one can be deleted") from None


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash all tokenizer state that affects its output."""
    from datasets.fingerprint import Hasher

    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.is_fast:  # truncation and padding of the last call are not part of it
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return Hasher.hash(tokenizer)


def streamed(
    path: Path,
    encoder: Encoder,
    *,
    seed: int = 0,
    buffer: int = 1000,
    workers: int = 0,
    turns: str = "last",
) -> datasets.IterableDataset:
    """Return an endless data set of a file's usable items, shuffled with a buffer by ``datasets``.

    The order is a function of the seed. Each of ``workers`` data loader workers reads its share of
    the rows; accelerate distributes items to processes.

    Args:
        path: .jsonl, .csv, .tsv or .parquet, read row by row; .json is read completely.
        buffer: size of the shuffle buffer in items.
        turns: see :func:`expanded`.
    """
    path, count = existing_file(path, "--train"), max(1, workers)

    def items(shares: list[int]) -> Iterator[dict[str, Any]]:
        for _ in itertools.count():
            usable = False
            rows = expanded(iter_rows(path), encoder.task, turns)
            rows = (row for number, row in enumerate(rows) if number % count in shares)
            for item in encoder.items(rows):
                if not item.lost:
                    usable = True
                    yield item.columns()
            if not usable:  # another pass would find no usable rows either
                expected = (
                    f"rows whose prompt and answer fit within max_length {encoder.max_length}"
                )
                raise wrong("--train", f"{path} without a usable row", expected)

    import datasets  # absent where only the GPU tests run

    # datasets gives each worker one of the values of a list
    shares = {"shares": list(range(count))}
    stream = datasets.IterableDataset.from_generator(items, gen_kwargs=shares)
    return stream.shuffle(seed=seed, buffer_size=buffer)


def expanded(rows: Iterable[Row], task: Task, turns: str) -> Iterator[Row]:
    """Expand conversations into training rows: for ``turns`` "all" one for each answer, for "last"
    one for the last answer.
    """
    for row in rows:
        yield from task.training_rows(row) if turns == "all" else [row]


def all_lost(max_length: int) -> UserError:
    """Build the error for a data set without usable rows."""
    what = f"{max_length}, which leaves no row both a prompt and an answer"
    return wrong("max_length", what, "a larger number")


def _empty(name: str, text: str, where: str | None) -> UserError:
    return wrong(f"{name}{f' of {where}' if where else ''}", repr(text), "text")
