"""From a task's rows to token ids: what a model reads, and which of its tokens are learned.

Prompt and target are tokenized apart and joined, so that a prompt's tokens are the same when its
answer is generated:

    causal          prompt = BOS + text, labels -100;   target = text + EOS, learned
    seq2seq         input_ids = the prompt with the tokenizer's special tokens;   labels = text +
                    EOS
    classification  input_ids = the tokenizer's own encoding of a text or a pair;   labels = a
                    number
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
IGNORED = -100  # a label that the loss leaves out
_CHUNK = 1000  # rows tokenized together, which fast tokenizers do on several threads


class Item(NamedTuple):
    """One example as token ids; ``cut_prompt`` and ``cut_target`` are numbers of tokens that did
    not fit.

    ``lost``: of a prompt or a target that was cut, nothing is left but its special tokens (or a
    prompt's last token).
    """

    input_ids: list[int]
    labels: list[int] | int | float
    token_type_ids: list[int] | None = None
    cut_prompt: int = 0
    cut_target: int = 0
    lost: bool = False


class Cuts(NamedTuple):
    """How many examples of a data set lost tokens, of prompts (or of texts to classify) and of
    targets.
    """

    prompts: int
    targets: int


class Specials(NamedTuple):
    """What a tokenizer puts around a text: ids before it and after it, the id that ends an
    answer, the text of BOS.
    """

    before: list[int]
    after: list[int]
    eos: int | None
    bos: int | None
    bos_text: str | None

    @classmethod
    def of(cls, tokenizer: Any) -> Specials:
        """Ask a tokenizer, by a letter with and without special tokens.

        Raises:
            UserError: a tokenizer that has no token for it.
        """
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        found = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
        if not found:
            raise UserError(
                f"tokenizer: got a {type(tokenizer).__name__} that reads 'a' as {whole}, expected "
                "a token for it"
            )
        before, after = whole[: found[0]], whole[found[0] + len(bare) :]
        return cls(
            before, after, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.bos_token
        )


def pad_id(tokenizer: Any) -> int:
    """The id that fills a row: the pad token's, or the EOS token's where there is none, since
    padding is not learned.

    Raises:
        UserError: a tokenizer with neither.
    """
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return found
    raise UserError(
        f"tokenizer: got a {type(tokenizer).__name__} without a pad or EOS token, expected one of "
        "them"
    )


def causal(example: Example, tokenizer: Any, max_length: int, *, where: str | None = None) -> Item:
    """An example of a causal language model, at most ``max_length`` tokens.

    The target is kept and the prompt is cut from the left, after its BOS; a target that does not
    fit beside one token of the prompt is cut at its end, before its EOS.

    Args:
        where: tells a user which row it is.

    Raises:
        UserError: an empty prompt, a tokenizer without EOS, ``max_length`` under 2.
    """
    return _causal([example], [where], tokenizer, Specials.of(tokenizer), max_length)[0]


def seq2seq(example: Example, tokenizer: Any, max_length: int, *, where: str | None = None) -> Item:
    """An example of an encoder-decoder, its prompt (cut from the left) and its target (cut at its
    end) ``max_length`` each.

    Args, Raises: as :func:`causal`.
    """
    return _seq2seq([example], [where], tokenizer, Specials.of(tokenizer), max_length)[0]


def classification(
    classified: Classified, tokenizer: Any, max_length: int, *, where: str | None = None
) -> Item:
    """A text or a pair to classify; of a pair the longer text is cut first.

    Args, Raises: as :func:`causal`, without the EOS.
    """
    return _classification([classified], [where], tokenizer, None, max_length)[0]


def prompt_ids(
    prompts: Sequence[str], tokenizer: Any, max_length: int, kind: str = "causal"
) -> list[list[int]]:
    """The tokens of prompts to generate from: those of training, each cut from the left to
    ``max_length`` of them.

    Raises:
        UserError: an empty prompt, or a ``max_length`` that leaves it no token.
    """
    specials = Specials.of(tokenizer)
    after = specials.after if kind == "seq2seq" else []
    if max_length <= len(after):
        raise UserError(f"max_length: got {max_length}, expected at least {len(after) + 1}")
    bodies = _prompts(prompts, [None] * len(prompts), tokenizer, specials)
    return [_cut_left(before, body, max_length - len(after)) + after for before, body in bodies]


def tokenize_rows(
    rows: Iterable[Row], task: Task, tokenizer: Any, kind: str, max_length: int
) -> datasets.Dataset:
    """Every row that is not lost (:class:`Item`) as a data set.

    Its columns: ``input_ids``, ``labels``, ``length`` (of ``input_ids``), ``cut_prompt`` and
    ``cut_target``; ``token_type_ids`` are there where the tokenizer gives them; :func:`count_cuts`
    counts what was cut.

    Raises:
        UserError: no rows, all of them lost, a row that the task refuses, or one that
            :func:`causal` does.
    """
    import datasets

    tokens = datasets.Sequence(datasets.Value("int32"))
    count = datasets.Value("int32")
    number = datasets.Value(
        "float64" if kind == "classification" and task.labels is None else "int64"
    )
    features = {
        "input_ids": tokens,
        "labels": number if kind == "classification" else tokens,
        "length": count,
        "cut_prompt": count,
        "cut_target": count,
    }
    parts, read = [], 0
    for items in _chunks(rows, task, tokenizer, kind, max_length):
        read += len(items)
        items = [item for item in items if not item.lost]
        if not items:
            continue
        columns = {
            name: [getattr(item, name) for item in items] for name in features if name != "length"
        }
        columns["length"] = [len(item.input_ids) for item in items]
        present = dict(features)
        if items[0].token_type_ids is not None:
            columns["token_type_ids"], present["token_type_ids"] = (
                [item.token_type_ids for item in items],
                tokens,
            )
        parts.append(datasets.Dataset.from_dict(columns, features=datasets.Features(present)))
    if not read:
        raise UserError("data: got no rows, expected at least one")
    if not parts:
        raise all_lost(max_length)
    return datasets.concatenate_datasets(parts)


def iter_items(
    rows: Iterable[Row], task: Task, tokenizer: Any, kind: str, max_length: int
) -> Iterator[Item]:
    """An item of each row, the lost ones too, one at a time and as they are asked for."""
    for items in _chunks(rows, task, tokenizer, kind, max_length, chunk=1):
        yield from items


def count_cuts(dataset: datasets.Dataset) -> Cuts:
    """How many examples of :func:`tokenize_rows`'s data set were cut."""
    return Cuts(*(sum(cut > 0 for cut in dataset[name]) for name in ("cut_prompt", "cut_target")))


def all_lost(max_length: int) -> UserError:
    """The error where no row is left to train on."""
    return UserError(
        f"max_length: got {max_length}, which leaves no row both a prompt and an answer, expected "
        "more"
    )


# ---- many at once


def _chunks(rows, task, tokenizer, kind, max_length, chunk: int = _CHUNK) -> Iterator[list[Item]]:
    if kind not in KINDS:
        raise UserError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    specials = None if kind == "classification" else Specials.of(tokenizer)
    encode = {"causal": _causal, "seq2seq": _seq2seq, "classification": _classification}[kind]
    rows = iter(rows)
    while taken := list(islice(rows, chunk)):
        if kind == "classification":
            read = [task.classified(row) for row in taken]
        else:
            read = [task.example(row, tokenizer) for row in taken]
        yield encode(read, [row.where for row in taken], tokenizer, specials, max_length)


def _causal(examples, wheres, tokenizer, specials: Specials, max_length: int) -> list[Item]:
    _check_length(max_length)
    items = []
    for (before, body), whole in _prompts_and_targets(examples, wheres, tokenizer, specials):
        target = _cut_end(whole, max_length - 1)
        prompt = _cut_left(before, body, max_length - len(target))
        cuts = len(before) + len(body) - len(prompt), len(whole) - len(target)
        lost = _lost(len(prompt), len(before), cuts[0]) or (cuts[1] > 0 and len(target) == 1)
        items.append(Item(prompt + target, [IGNORED] * len(prompt) + target, None, *cuts, lost))
    return items


def _seq2seq(examples, wheres, tokenizer, specials: Specials, max_length: int) -> list[Item]:
    _check_length(max_length)
    items = []
    for (before, body), whole in _prompts_and_targets(examples, wheres, tokenizer, specials):
        target = _cut_end(whole, max_length)
        prompt = _cut_left(before, body, max_length - len(specials.after))
        cuts = len(before) + len(body) - len(prompt), len(whole) - len(target)
        lost = _lost(len(prompt), len(before), cuts[0]) or (cuts[1] > 0 and len(target) == 1)
        items.append(Item(prompt + specials.after, target, None, *cuts, lost))
    return items


def _classification(examples, wheres, tokenizer, specials: None, max_length: int) -> list[Item]:
    _check_length(max_length)
    items = []
    for classified, where in zip(examples, wheres, strict=True):
        texts = (
            (classified.text,) if classified.pair is None else (classified.text, classified.pair)
        )
        encoded = tokenizer(*texts, verbose=False)
        full = len(encoded["input_ids"])
        if full == 0:
            raise _empty("text", classified.text, where)
        if full > max_length:
            encoded = tokenizer(*texts, truncation="longest_first", max_length=max_length)
        cut = full - len(encoded["input_ids"])
        items.append(
            Item(encoded["input_ids"], classified.label, encoded.get("token_type_ids"), cut)
        )
    return items


def _prompts_and_targets(examples, wheres, tokenizer, specials: Specials):
    for example, where in zip(examples, wheres, strict=True):
        if not example.target.strip():
            raise _empty("target", example.target, where)
    prompts = _prompts([example.prompt for example in examples], wheres, tokenizer, specials)
    return zip(prompts, _targets(examples, tokenizer, specials), strict=True)


def _prompts(
    prompts: Sequence[str], wheres, tokenizer, specials: Specials
) -> list[tuple[list[int], list[int]]]:
    """Of each prompt, the special tokens before it and its text's; a BOS that a chat template
    wrote is not doubled.
    """
    found = []
    for prompt, where, body in zip(prompts, wheres, _encode(prompts, tokenizer), strict=True):
        before = specials.before
        if (
            specials.bos_text
            and prompt.startswith(specials.bos_text)
            and body[:1] == [specials.bos]
        ):
            before, body = body[:1], body[1:]
        if not prompt.strip() or not body:
            raise _empty("prompt", prompt, where)
        found.append((before, body))
    return found


def _targets(examples: Sequence[Example], tokenizer, specials: Specials) -> list[list[int]]:
    if specials.eos is None:
        raise UserError(
            f"tokenizer: got a {type(tokenizer).__name__} without an EOS token, expected one: it "
            "ends an answer"
        )
    ids = _encode([e.target for e in examples], tokenizer)
    return [row if row[-1:] == [specials.eos] else [*row, specials.eos] for row in ids]


def _encode(texts: Sequence[str], tokenizer) -> list[list[int]]:
    return [
        list(ids)
        for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ]


def _cut_left(before: list[int], body: list[int], room: int) -> list[int]:
    """``before + body`` in at most ``room`` tokens: the last ones of ``body`` go after the first
    ones of ``before``.
    """
    before = before[:room]
    kept = room - len(before)
    return before + (body if len(body) <= kept else body[len(body) - kept :])


def _lost(kept: int, before: int, cut: int) -> bool:
    """Whether a prompt that was cut has lost its text: no more than its special tokens, or one
    token, is left.
    """
    return cut > 0 and kept <= max(before, 1)


def _cut_end(target: list[int], room: int) -> list[int]:
    """``target`` in at most ``room`` tokens, the last of which ends it."""
    return target if len(target) <= room else [*target[: room - 1], target[-1]]


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise UserError(f"max_length: got {max_length}, expected at least 2")


def _empty(name: str, text: str, where: str | None) -> UserError:
    return UserError(f"{name}{f' of {where}' if where else ''}: got {text!r}, expected text")
