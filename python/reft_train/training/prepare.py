"""From a run's settings to tokenized examples: rows found, read, split, tokenized, cached, and
how to batch them.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from reft_train import tasks
from reft_train.config import REFT_METHODS, RunConfig
from reft_train.data import caching, collating, packing, sampling, sources, streaming, tokenizing
from reft_train.data.reading import iter_rows, read_rows
from reft_train.errors import UserError
from reft_train.models import CAUSAL, CLASSIFICATION, SEQ2SEQ, Loaded
from reft_train.ranks import is_first
from reft_train.tasks.base import Row, Task
from reft_train.tasks.glue import Glue, validation_split

_TRIED = 1000  # rows of a stream that are looked at before the training


@dataclass
class Rows:
    """Rows of a run: to train on (None where they are streamed from ``stream``), held out, and
    of each test set.
    """

    train: list[Row] | None
    held_out: list[Row] = field(default_factory=list)
    tests: dict[str, list[Row]] = field(default_factory=dict)
    stream: Path | None = None


def _expanded(rows: Iterable[Row], config: RunConfig, task: Task) -> Iterator[Row]:
    """The rows that are trained: of a conversation one for each answer, unless the last alone is
    wanted.
    """
    for row in rows:
        yield from task.training_rows(row) if config.turns == "all" else [row]


def _limited(rows: Sequence[Row], limit: int | None) -> list[Row]:
    return list(rows if limit is None else rows[:limit])


def _split(rows: list[Row], validation: float, seed: int) -> tuple[list[Row], list[Row]]:
    if not validation:
        return rows, []
    count = round(len(rows) * validation) if validation < 1 else int(validation)
    if not 0 < count < len(rows):
        raise UserError(
            f"validation: got {validation:g} of {len(rows)} training rows, expected at least one "
            "on either side"
        )
    order = list(range(len(rows)))
    random.Random(f"validation/{seed}").shuffle(order)
    held = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def find_rows(config: RunConfig, task: Task, *, train: bool = True) -> Rows:
    """Read a run's rows. Held-out rows come from the training part (for GLUE, from a part of
    validation), never from a test.

    Args:
        train: whether training rows are wanted; False for evaluation alone.

    Raises:
        UserError: files that are missing or malformed, a split that leaves nothing.
    """
    tests_wanted = not config.skip_test
    if isinstance(task, Glue) and config.data is None and config.train is None and not config.test:
        read = {
            "train": sources.hub_rows(task, "train") if train else [],
            "test": sources.hub_rows(task, task.test_sets[0]),
        }
        found, tests = read["train"], {task.test_sets[0]: read["test"]}
    else:
        files = sources.find(
            task,
            _path(config.data),
            _path(config.train),
            [Path(p) for p in config.test],
            train_needed=train,
            tests_needed=not train,
        )
        if train and config.streaming:
            return Rows(
                None,
                [],
                _shortened(_tests(files.tests), config) if tests_wanted else {},
                files.train,
            )
        found = read_rows(files.train, "--train") if train else []
        tests = _tests(files.tests) if tests_wanted or isinstance(task, Glue) else {}
    held_out: list[Row] = []
    if isinstance(task, Glue) and tests:
        # the paper's protocol: a part of validation chooses, the rest reports
        (name, rows), *others = tests.items()
        chosen, reported = validation_split(len(rows), config.seed)
        held_out = [rows[i] for i in chosen]
        tests = {name: [rows[i] for i in reported], **dict(others)}
    found = _limited(found, config.train_rows)
    if train and config.validation:
        found, held_out = _split(found, config.validation, config.seed)
    if train:  # a conversation is whole on one side of the split
        found, held_out = (list(_expanded(part, config, task)) for part in (found, held_out))
    return Rows(found, held_out, _shortened(tests, config) if tests_wanted else {})


def _tests(files: dict[str, Path]) -> dict[str, list[Row]]:
    return {name: read_rows(path, "--test") for name, path in files.items()}


def _shortened(tests: dict[str, list[Row]], config: RunConfig) -> dict[str, list[Row]]:
    """After GLUE's split, so that the rows that choose are the same ones."""
    return {name: _limited(rows, config.test_rows) for name, rows in tests.items()}


def _digest(rows: list[Row]) -> str:
    """Of the rows' content, so that a changed file, split or limit is another data set."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dict(row.fields), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def digest(rows: Rows) -> str:
    """Of the training rows; of a stream, which is not read for it, the size of its file."""
    return _digest(rows.train) if rows.train is not None else f"{rows.stream.stat().st_size} bytes"


def tokenized(config: RunConfig, loaded: Loaded, task: Task, rows: list[Row], name: str) -> Any:
    """The rows as a data set of token ids, from the cache where the very same rows were
    tokenized before.
    """

    def build() -> Any:
        return tokenizing.tokenize_rows(
            rows, task, loaded.tokenizer, loaded.kind, config.max_length
        )

    parts = {
        "rows": _digest(rows),
        "tokenizer": caching.tokenizer_digest(loaded.tokenizer),
        "task": task.name,
        "kind": loaded.kind,
        "max_length": config.max_length,
    }
    dataset = caching.cached(
        build, parts, None if config.cache is None else Path(config.cache) / "tokenized"
    )
    _say_lost(name, len(rows) - len(dataset), len(rows), config)
    cuts = tokenizing.count_cuts(dataset)
    if (cuts.prompts or cuts.targets) and is_first():
        print(
            f"{name}: {cuts.prompts} of {len(dataset)} prompts cut from the left and "
            f"{cuts.targets} targets cut at the end "
            f"to fit max_length {config.max_length}",
            file=sys.stderr,
        )
    return dataset


def _say_lost(name: str, lost: int, count: int, config: RunConfig) -> None:
    if lost and is_first():
        print(
            f"{name}: {lost} of {count} dropped: max_length {config.max_length} leaves them no "
            "prompt or no answer",
            file=sys.stderr,
        )


def check_rows(rows: Iterable[Row], loaded: Loaded, task: Task) -> None:
    """Try whether the task takes rows, before a training that they come after.

    Raises:
        UserError: a row that it refuses.
    """
    for row in rows:
        if loaded.kind == CLASSIFICATION:
            task.classified(row)
        else:
            task.example(row, loaded.tokenizer)


def stream(config: RunConfig, loaded: Loaded, task: Task, path: Path) -> Any:
    """A training file, read and tokenized while training; its first rows are tried before.

    Raises:
        UserError: a row among them that the task refuses, or none that keeps a prompt and an
            answer.
    """
    tried = _expanded(islice(iter_rows(path, "--train"), _TRIED), config, task)
    items = tokenizing.iter_items(tried, task, loaded.tokenizer, loaded.kind, config.max_length)
    lost = [item.lost for item in items]
    if all(lost):
        raise tokenizing.all_lost(config.max_length)
    _say_lost("first training rows", sum(lost), len(lost), config)
    return streaming.StreamingRows(
        path,
        task,
        loaded.tokenizer,
        loaded.kind,
        config.max_length,
        seed=config.seed,
        buffer=config.shuffle_buffer,
        endless=True,
        all_turns=config.turns == "all",
    )


def response_template(
    config: RunConfig, loaded: Loaded, task: Task, rows: Rows
) -> list[int] | None:
    """What ends a prompt in a chat, for the adapter to keep; None where the rows are no chats of a
    causal model.

    It must end every prompt that is looked at, and stand in no answer; else, and where the
    tokenizer's chat template has none, a line says why and the labels tell where prompts end.
    """
    from reft_kernels.integrations.peft import from_chat_template

    if loaded.kind != CAUSAL or config.method not in REFT_METHODS:
        return None
    file_rows = iter_rows(rows.stream, "--train") if rows.train is None else rows.train
    tried = list(islice(_expanded(file_rows, config, task), _TRIED // 10))
    if (
        not tried
        or not all("messages" in row.fields for row in tried)
        or not loaded.tokenizer.chat_template
    ):
        return None
    try:
        template = from_chat_template(loaded.tokenizer)
    except ValueError as error:
        return _without_template(" ".join(str(error).split()))
    for row, item in zip(
        tried,
        tokenizing.iter_items(tried, task, loaded.tokenizer, CAUSAL, sys.maxsize),
        strict=True,
    ):
        prompt, ids, length = item.labels.count(tokenizing.IGNORED), item.input_ids, len(template)
        ends = [end for end in range(length, len(ids) + 1) if ids[end - length : end] == template]
        if not ends or ends[-1] > prompt:
            where = "ends inside the answer" if ends else "is not in the prompt"
            return _without_template(
                f"{loaded.tokenizer.decode(template)!r} {where} of {row.where}"
            )
    return template


def _without_template(reason: str) -> None:
    if is_first():
        print(
            f"response_template: none ({reason}); the labels tell where prompts end in training, "
            "and scoring without labels "
            "needs prompt_lengths",
            file=sys.stderr,
        )


def sampler(config: RunConfig, dataset: Any, processes: int) -> Any:
    """The order of a data set's examples, a function of seed and epoch; None for a stream."""
    if not hasattr(dataset, "__len__"):
        return None
    if config.group_by_length:
        group = config.batch_size * config.accumulation * processes
        return sampling.GroupedSampler(dataset["length"], group, config.seed)
    return sampling.ShuffledSampler(len(dataset), config.seed)


def collator(config: RunConfig, loaded: Loaded) -> Callable[[Sequence[dict]], dict]:
    """What makes batches: padded ones, or packed ones where that is wanted.

    Raises:
        UserError: packing with a model that does not keep packed examples apart.
    """
    pad = tokenizing.pad_id(loaded.tokenizer)
    if loaded.kind == SEQ2SEQ:
        collate: Callable = collating.Seq2SeqCollator(pad)
    elif loaded.kind == CAUSAL:
        collate = collating.PaddingCollator(pad)
    else:
        collate = collating.ClassificationCollator(pad)
    if not config.packing:
        return collate
    if loaded.kind != CAUSAL:
        raise UserError(f"packing: got true with a {loaded.kind} model, expected a causal one")
    flat = str(getattr(loaded.model.config, "_attn_implementation", "")).startswith(
        "flash_attention"
    )
    packing.check_model_packs(loaded.model, pad, flat)
    return packing.PackingCollator(config.packed_length or config.max_length, pad, flat)


def task_of(config: RunConfig) -> Task:
    """The run's task."""
    return tasks.get(config.task)
