"""Tokenization of a task's rows into input ids and labels.

Prompt and target are tokenized separately, so that prompt tokens are the same in generation:

    causal          prompt = BOS + text, labels -100;   target = text + EOS, learned
    seq2seq         input_ids = the prompt with its special tokens;   labels = text + EOS
    classification  input_ids = the tokenizer's encoding of a text or a pair;   labels = a number
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from reft_train.errors import UserError

if TYPE_CHECKING:
    import datasets

    from reft_train.tasks.base import Classified, Example, Row, Task

KINDS = ("causal", "seq2seq", "classification")
IGNORED = -100  # label ignored by the loss
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


class Cuts(NamedTuple):
    """Numbers of examples with truncated prompts (or texts to classify) and truncated targets."""

    prompts: int
    targets: int


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
        letter_ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        encoded = tokenizer("a")["input_ids"]
        starts = [
            i
            for i in range(len(encoded))
            if letter_ids and encoded[i : i + len(letter_ids)] == letter_ids
        ]
        if not starts:
            name = type(tokenizer).__name__
            raise UserError(
                f"tokenizer: got a {name} that reads 'a' as {encoded}, expected a token for it"
            )
        before, after = encoded[: starts[0]], encoded[starts[0] + len(letter_ids) :]
        return cls(
            before, after, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.bos_token
        )


def pad_id(tokenizer: Any) -> int:
    """Return the id used for padding: the pad token's, or else the EOS token's."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    name = type(tokenizer).__name__
    raise UserError(f"tokenizer: got a {name} without a pad or EOS token, expected one of them")


def encode(
    kind: str,
    example: Example | Classified,
    tokenizer: Any,
    max_length: int,
    *,
    where: str | None = None,
) -> Item:
    """Encode one example for a model of ``kind``.

    The target is kept and the prompt is cut from the left, after its BOS. A target that does not
    fit next to one prompt token is cut at its end, before its EOS. Prompt and target of an
    encoder-decoder have ``max_length`` tokens each. For a pair to classify, the longer text is cut
    first.

    Args:
        where: location of the row for error messages.
    """
    return _encode(kind, [example], [where], tokenizer, max_length)[0]


def prompt_ids(
    prompts: Sequence[str], tokenizer: Any, max_length: int, kind: str = "causal"
) -> list[list[int]]:
    """Tokenize prompts for generation as in training, each cut from the left."""
    specials = Specials.of(tokenizer)
    after = specials.after if kind == "seq2seq" else []
    if max_length <= len(after):
        raise UserError(f"max_length: got {max_length}, expected at least {len(after) + 1}")
    bodies = _prompts(prompts, [None] * len(prompts), tokenizer, specials)
    return [_cut_left(before, body, max_length - len(after)) + after for before, body in bodies]


def tokenize_rows(
    rows: Iterable[Row], task: Task, tokenizer: Any, kind: str, max_length: int
) -> datasets.Dataset:
    """Tokenize all rows that are not lost (see :class:`Item`), with a ``length`` column."""
    import datasets

    tokens, count = datasets.Sequence(datasets.Value("int32")), datasets.Value("int32")
    number = datasets.Value(
        "float64" if kind == "classification" and task.labels is None else "int64"
    )
    labels = number if kind == "classification" else tokens
    features = {
        "input_ids": tokens,
        "labels": labels,
        "token_type_ids": tokens,
        "cut_prompt": count,
        "cut_target": count,
    }
    parts, read = [], 0
    for items in _chunks(rows, task, tokenizer, kind, max_length, _CHUNK):
        read += len(items)
        items = [item for item in items if not item.lost]
        if items:
            names = [name for name in features if getattr(items[0], name) is not None]
            columns = {name: [getattr(item, name) for item in items] for name in names}
            columns["length"] = [len(item.input_ids) for item in items]
            schema = datasets.Features({name: features[name] for name in names} | {"length": count})
            parts.append(datasets.Dataset.from_dict(columns, features=schema))
    if not read:
        raise UserError("data: got no rows, expected at least one")
    if not parts:
        raise all_lost(max_length)
    return datasets.concatenate_datasets(parts)


def iter_items(
    rows: Iterable[Row], task: Task, tokenizer: Any, kind: str, max_length: int
) -> Iterator[Item]:
    """Lazily yield an item for each row, including lost ones."""
    for items in _chunks(rows, task, tokenizer, kind, max_length, 1):
        yield from items


def count_cuts(dataset: datasets.Dataset) -> Cuts:
    """Count the truncated examples in a data set of :func:`tokenize_rows`."""
    return Cuts(*(sum(cut > 0 for cut in dataset[name]) for name in ("cut_prompt", "cut_target")))


def all_lost(max_length: int) -> UserError:
    """Build the error for a data set without usable rows."""
    return UserError(
        f"max_length: got {max_length}, which leaves no row both a prompt and an answer, expected "
        "more"
    )


def _chunks(rows, task, tokenizer, kind, max_length: int, chunk: int) -> Iterator[list[Item]]:
    rows = iter(rows)
    while taken := list(islice(rows, chunk)):
        if kind == "classification":
            read = [task.classified(row) for row in taken]
        else:
            read = [task.example(row, tokenizer) for row in taken]
        yield _encode(kind, read, [row.where for row in taken], tokenizer, max_length)


def _encode(kind: str, examples, locations, tokenizer, max_length: int) -> list[Item]:
    if kind not in KINDS:
        raise UserError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if max_length < 2:
        raise UserError(f"max_length: got {max_length}, expected at least 2")
    if kind == "classification":
        return [
            _text(classified, where, tokenizer, max_length)
            for classified, where in zip(examples, locations, strict=True)
        ]
    specials, causal, items = Specials.of(tokenizer), kind == "causal", []
    for example, where in zip(examples, locations, strict=True):
        if not example.target.strip():
            raise _empty("target", example.target, where)
    prompts = _prompts([example.prompt for example in examples], locations, tokenizer, specials)
    for (before, body), whole in zip(prompts, _targets(examples, tokenizer, specials), strict=True):
        room = max_length - causal  # a causal prompt keeps one token next to its target
        target = whole if len(whole) <= room else [*whole[: room - 1], whole[-1]]
        prompt = _cut_left(before, body, max_length - len(target if causal else specials.after))
        cuts = len(before) + len(body) - len(prompt), len(whole) - len(target)
        lost = (cuts[0] > 0 and len(prompt) <= max(len(before), 1)) or (
            cuts[1] > 0 and len(target) == 1
        )
        if causal:
            items.append(Item(prompt + target, [IGNORED] * len(prompt) + target, None, *cuts, lost))
        else:
            items.append(Item(prompt + specials.after, target, None, *cuts, lost))
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
        before = specials.before
        if (
            specials.bos_text
            and prompt.startswith(specials.bos_text)
            and body[:1] == [specials.bos]
        ):
            before, body = body[:1], body[1:]
        if not prompt.strip() or not body:
            raise _empty("prompt", prompt, where)
        encoded.append((before, body))
    return encoded


def _targets(examples: Sequence[Example], tokenizer, specials: Specials) -> list[list[int]]:
    if specials.eos is None:
        name = type(tokenizer).__name__
        raise UserError(
            f"tokenizer: got a {name} without an EOS token, expected one: it ends an answer"
        )
    rows = _ids([example.target for example in examples], tokenizer)
    return [row if row[-1:] == [specials.eos] else [*row, specials.eos] for row in rows]


def _ids(texts: Sequence[str], tokenizer) -> list[list[int]]:
    return [
        list(ids)
        for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ]


def _cut_left(before: list[int], body: list[int], room: int) -> list[int]:
    """Cut ``before + body`` to ``room`` tokens by dropping tokens at the start of ``body``.

    At least the first token of ``before`` is kept.
    """
    before = before[:room]
    kept = room - len(before)
    return before + (body if len(body) <= kept else body[len(body) - kept :])


def _empty(name: str, text: str, where: str | None) -> UserError:
    return UserError(f"{name}{f' of {where}' if where else ''}: got {text!r}, expected text")
