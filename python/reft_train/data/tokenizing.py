"""Tokenization of a task's rows into input ids and labels, as a cached data set or a stream.

Prompt and target are tokenized separately, so that prompt tokens are the same in generation:

    causal          prompt = BOS + text, labels -100;   target = text + EOS, learned
    seq2seq         input_ids = the prompt with its special tokens;   labels = text + EOS
    classification  input_ids = the tokenizer's encoding of a text or a pair;   labels = a number
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reft_train.data.reading import existing_file, iter_rows
from reft_train.errors import UserError, one_line, wrong
from reft_train.tasks.base import Classified, Example, Row, Task

if TYPE_CHECKING:
    import datasets

IGNORED = -100  # label ignored by the loss
_FORMAT = 5  # version of the cached format; part of every key
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


class Specials(NamedTuple):
    """Special tokens of a tokenizer: ids before and after a text, EOS and BOS ids, BOS text."""

    before: list[int]
    after: list[int]
    eos: int | None
    bos: int | None
    bos_text: str | None

    @classmethod
    def of(cls, tokenizer: Any) -> Specials:
        """Determine the special tokens by encoding a letter with and without them."""
        letter = tokenizer("a", add_special_tokens=False)["input_ids"]
        encoded, size = tokenizer("a")["input_ids"], len(letter)
        starts = [i for i in range(len(encoded)) if letter and encoded[i : i + size] == letter]
        if not starts:
            what = f"a {type(tokenizer).__name__} that encodes 'a' as {encoded}"
            raise wrong("tokenizer", what, "a token for it")
        ends = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.bos_token
        return cls(encoded[: starts[0]], encoded[starts[0] + size :], *ends)


def prompt_ids(
    prompts: Sequence[str], tokenizer: Any, max_length: int, kind: str = "causal"
) -> list[list[int]]:
    """Tokenize prompts for generation as in training, each cut from the left."""
    specials = Specials.of(tokenizer)
    after = specials.after if kind == "seq2seq" else []
    if max_length <= len(after):
        raise wrong("max_length", max_length, f"at least {len(after) + 1}")
    bodies = _prompts(prompts, [None] * len(prompts), tokenizer, specials)
    return [_cut_left(before, body, max_length - len(after)) + after for before, body in bodies]


def tokenize_rows(
    rows: Sequence[Row],
    task: Task,
    tokenizer: Any,
    kind: str,
    max_length: int,
    key: dict[str, Any],
    folder: Path | None = None,
) -> datasets.Dataset:
    """Tokenize all rows that are not lost (see :class:`Item`), or load them from the cache.

    The data set has the columns of :meth:`Item.columns`, ``length``, and the cut tokens.

    Args:
        key: identifies rows and tokenizer; see :func:`cached`.
    """
    import datasets

    if not rows:
        raise wrong("data", "no rows", "at least one")
    tokens, count = datasets.Sequence(datasets.Value("int32")), datasets.Value("int32")
    number = datasets.Value("float64" if task.labels is None else "int64")
    features = {"input_ids": tokens, "labels": number if kind == "classification" else tokens}
    first = next(iter_items(rows[:1], task, tokenizer, kind, max_length))
    if first.token_type_ids is not None:
        features["token_type_ids"] = tokens
    features |= dict.fromkeys(("length", "cut_prompt", "cut_target"), count)

    def items() -> Iterator[dict[str, Any]]:
        lost = 0
        for item in iter_items(rows, task, tokenizer, kind, max_length, _CHUNK):
            lost += item.lost
            if not item.lost:
                cuts = {"cut_prompt": item.cut_prompt, "cut_target": item.cut_target}
                yield {**item.columns(), "length": len(item.input_ids), **cuts}
        if lost == len(rows):
            raise all_lost(max_length)

    key = {**key, "task": task.name, "kind": kind, "max_length": max_length}
    return cached(items, datasets.Features(features), key, folder)


def cached(
    items: Callable[[], Iterable[dict[str, Any]]],
    features: datasets.Features,
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
    options = {"features": features, "cache_dir": str(place), "fingerprint": key}
    try:
        return datasets.Dataset.from_generator(items, **options)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        what = f"{place}, which cannot be read or written ({one_line(cause)})"
        raise wrong("cache", what, "a writable folder; a damaged one can be deleted") from None


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash all tokenizer state that affects its output.

    Covers vocabulary, rules, special tokens, chat template, and padding and truncation sides.
    """
    from datasets.fingerprint import Hasher

    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = tokenizer
    if backend is not None:  # truncation and padding of the last call are not part of it
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        rules = json.dumps(rules, sort_keys=True)
    settings = {
        "class": type(tokenizer).__name__,
        "rules": rules,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": getattr(tokenizer, "chat_template", None),
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "added": [getattr(tokenizer, f"add_{end}_token", None) for end in ("bos", "eos")],
    }
    return Hasher.hash(settings)


def streamed(
    path: Path,
    task: Task,
    tokenizer: Any,
    kind: str,
    max_length: int,
    *,
    seed: int = 0,
    buffer: int = 1000,
    workers: int = 0,
    all_turns: bool = False,
) -> datasets.IterableDataset:
    """Return an endless data set of a file's usable items, shuffled with a buffer by ``datasets``.

    The order is a function of the seed. Each of ``workers`` data loader workers reads its share of
    the rows; accelerate distributes items to processes.

    Args:
        path: .jsonl, .csv, .tsv or .parquet, read row by row; .json is read completely.
        task, tokenizer, kind, max_length: see :func:`tokenize_rows`.
        buffer: size of the shuffle buffer in items.
        all_turns: yield an item for each answer of a conversation instead of only the last.
    """
    path, count = existing_file(path, "--train"), max(1, workers)

    def items(shares: list[int]) -> Iterator[dict[str, Any]]:
        for _ in itertools.count():
            usable = False
            rows = iter_rows(path)
            rows = (
                part for row in rows for part in (task.training_rows(row) if all_turns else [row])
            )
            rows = (row for number, row in enumerate(rows) if number % count in shares)
            for item in iter_items(rows, task, tokenizer, kind, max_length):
                if not item.lost:
                    usable = True
                    yield item.columns()
            if not usable:  # another pass would find no usable rows either
                expected = f"rows whose prompt and answer fit within max_length {max_length}"
                raise wrong("--train", f"{path} without a usable row", expected)

    import datasets  # absent where only the GPU tests run

    # datasets gives each worker one of the values of a list
    shares = {"shares": list(range(count))}
    stream = datasets.IterableDataset.from_generator(items, gen_kwargs=shares)
    return stream.shuffle(seed=seed, buffer_size=buffer)


def iter_items(
    rows: Iterable[Row], task: Task, tokenizer: Any, kind: str, max_length: int, chunk: int = 1
) -> Iterator[Item]:
    """Lazily yield an item for each row, including lost ones, ``chunk`` rows at a time."""
    rows = iter(rows)
    while taken := list(itertools.islice(rows, chunk)):
        classes = kind == "classification"
        read = [task.classified(r) if classes else task.example(r, tokenizer) for r in taken]
        yield from encode(kind, read, [row.where for row in taken], tokenizer, max_length)


def all_lost(max_length: int) -> UserError:
    """Build the error for a data set without usable rows."""
    what = f"{max_length}, which leaves no row both a prompt and an answer"
    return wrong("max_length", what, "a larger number")


def encode(
    kind: str,
    examples: Sequence[Example] | Sequence[Classified],
    locations: Sequence[str | None],
    tokenizer: Any,
    max_length: int,
) -> list[Item]:
    """Encode examples for a model of ``kind``: causal, seq2seq or classification.

    The target is kept and the prompt is cut from the left, after its BOS. A target that does not
    fit next to one prompt token is cut at its end, before its EOS. Prompt and target of an
    encoder-decoder have ``max_length`` tokens each. For a pair to classify, the longer text is cut
    first.

    Args:
        locations: location of each row for error messages.
    """
    if max_length < 2:
        raise wrong("max_length", max_length, "at least 2")
    pairs = list(zip(examples, locations, strict=True))
    if kind == "classification":
        return [_text(classified, where, tokenizer, max_length) for classified, where in pairs]
    specials, causal, items = Specials.of(tokenizer), kind == "causal", []
    for example, where in pairs:
        if not example.target.strip():
            raise _empty("target", example.target, where)
    prompts = _prompts([example.prompt for example in examples], locations, tokenizer, specials)
    for (before, body), whole in zip(prompts, _targets(examples, tokenizer, specials), strict=True):
        room = max_length - causal  # a causal prompt keeps one token next to its target
        target = whole if len(whole) <= room else [*whole[: room - 1], whole[-1]]
        prompt = _cut_left(before, body, max_length - len(target if causal else specials.after))
        cuts = len(before) + len(body) - len(prompt), len(whole) - len(target)
        no_prompt = cuts[0] > 0 and len(prompt) <= max(len(before), 1)
        lost = no_prompt or (cuts[1] > 0 and len(target) == 1)
        ids = prompt + (target if causal else specials.after)
        labels = [IGNORED] * len(prompt) + target if causal else target
        items.append(Item(ids, labels, None, *cuts, lost))
    return items


def _text(classified: Classified, where: str | None, tokenizer, max_length: int) -> Item:
    texts = (classified.text,) if classified.pair is None else (classified.text, classified.pair)
    encoded = tokenizer(*texts, verbose=False)
    full = len(encoded["input_ids"])
    if full == 0:
        raise _empty("text", classified.text, where)
    if full > max_length:
        encoded = tokenizer(*texts, truncation="longest_first", max_length=max_length)
    cut = full - len(encoded["input_ids"])
    return Item(encoded["input_ids"], classified.label, encoded.get("token_type_ids"), cut)


def _prompts(
    prompts: Sequence[str], locations, tokenizer, specials: Specials
) -> list[tuple[list[int], list[int]]]:
    """Return each prompt's leading special tokens and text tokens.

    A BOS that the chat template has already written is not repeated.
    """
    encoded = []
    for prompt, where, body in zip(prompts, locations, _ids(prompts, tokenizer), strict=True):
        before, bos = specials.before, specials.bos_text
        if bos and prompt.startswith(bos) and body[:1] == [specials.bos]:
            before, body = body[:1], body[1:]
        if not prompt.strip() or not body:
            raise _empty("prompt", prompt, where)
        encoded.append((before, body))
    return encoded


def _targets(examples: Sequence[Example], tokenizer, specials: Specials) -> list[list[int]]:
    if specials.eos is None:
        what = f"a {type(tokenizer).__name__} without an EOS token"
        raise wrong("tokenizer", what, "one: it ends an answer")
    rows = _ids([example.target for example in examples], tokenizer)
    return [row if row[-1:] == [specials.eos] else [*row, specials.eos] for row in rows]


def _ids(texts: Sequence[str], tokenizer) -> list[list[int]]:
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _cut_left(before: list[int], body: list[int], room: int) -> list[int]:
    """Cut ``before + body`` to ``room`` tokens by dropping tokens at the start of ``body``.

    At least the first token of ``before`` is kept.
    """
    before = before[:room]
    return before + body[max(0, len(body) - (room - len(before))) :]


def _empty(name: str, text: str, where: str | None) -> UserError:
    return wrong(f"{name}{f' of {where}' if where else ''}", repr(text), "text")
