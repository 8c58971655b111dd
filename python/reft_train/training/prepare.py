"""Data preparation of a run: reading, splitting, tokenizing and batching rows."""

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

from reft_train.config import REFT_METHODS, RunConfig
from reft_train.data import caching, collating, packing, sampling, sources, streaming, tokenizing
from reft_train.data.reading import iter_rows, read_rows
from reft_train.errors import UserError
from reft_train.models import CAUSAL, CLASSIFICATION, SEQ2SEQ, Loaded
from reft_train.ranks import is_first
from reft_train.tasks.base import Row, Task
from reft_train.tasks.glue import Glue, validation_split

_TRIED = 1000  # stream rows that are checked before the training


@dataclass
class Rows:
    """Rows for training, held-out rows, and rows of each test set.

    Training rows are None if ``stream`` is their file.
    """

    train: list[Row] | None
    held_out: list[Row] = field(default_factory=list)
    tests: dict[str, list[Row]] = field(default_factory=dict)
    stream: Path | None = None


def _expanded(rows: Iterable[Row], config: RunConfig, task: Task) -> Iterator[Row]:
    """Expand conversations into training rows: one for each answer, or only the last answer."""
    for row in rows:
        yield from task.training_rows(row) if config.turns == "all" else [row]


def _split(rows: list[Row], validation: float, seed: int) -> tuple[list[Row], list[Row]]:
    if not validation:
        return rows, []
    count = round(len(rows) * validation) if validation < 1 else int(validation)
    if not 0 < count < len(rows):
        what = f"{validation:g} of {len(rows)} training rows"
        raise UserError(f"validation: got {what}, expected at least one on either side")
    order = list(range(len(rows)))
    random.Random(f"validation/{seed}").shuffle(order)
    held = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def find_rows(config: RunConfig, task: Task, *, train: bool = True) -> Rows:
    """Read a run's rows. Held-out rows come from the training set (for GLUE, from validation).

    Args:
        train: whether training rows are needed; False for evaluation only.
    """
    scored = not config.skip_test
    if isinstance(task, Glue) and config.data is None and config.train is None and not config.test:
        train_rows = sources.hub_rows(task, "train") if train else []
        tests = {task.test_sets[0]: sources.hub_rows(task, task.test_sets[0])}
    else:
        data, path = (None if name is None else Path(name) for name in (config.data, config.train))
        files = sources.find(
            task,
            data,
            path,
            list(map(Path, config.test)),
            train_needed=train,
            tests_needed=not train,
        )
        streams = train and config.streaming
        train_rows = read_rows(files.train, "--train") if train and not streams else []
        needed = scored or (isinstance(task, Glue) and not streams)
        tests = (
            {name: read_rows(path, "--test") for name, path in files.tests.items()}
            if needed
            else {}
        )
        if streams:
            return Rows(
                None,
                [],
                {name: rows[: config.test_rows] for name, rows in tests.items()},
                files.train,
            )
    held_out: list[Row] = []
    if isinstance(task, Glue) and tests:
        # as in the paper: one part of validation selects, the rest is reported
        name, rows = next(iter(tests.items()))
        chosen, reported = validation_split(len(rows), config.seed)
        held_out, tests[name] = [rows[i] for i in chosen], [rows[i] for i in reported]
    train_rows = train_rows[: config.train_rows]
    if train and config.validation:
        train_rows, held_out = _split(train_rows, config.validation, config.seed)
    if train:  # split before expanding, so that a conversation stays on one side
        train_rows, held_out = (
            list(_expanded(part, config, task)) for part in (train_rows, held_out)
        )
    return Rows(
        train_rows,
        held_out,
        {name: rows[: config.test_rows] for name, rows in tests.items()} if scored else {},
    )


def _digest(rows: list[Row]) -> str:
    """Hash the rows' content, so that a changed file, split or limit gives a different data set."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dict(row.fields), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def digest(rows: Rows) -> str:
    """Hash the training rows; for a stream, which is not read here, use the file size."""
    return _digest(rows.train) if rows.train is not None else f"{rows.stream.stat().st_size} bytes"


def _log(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr)


def tokenized(config: RunConfig, loaded: Loaded, task: Task, rows: list[Row], name: str) -> Any:
    """Tokenize the rows, or load them from the cache if the same rows were tokenized before."""

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
    _log_lost(name, len(rows) - len(dataset), len(rows), config)
    cuts = tokenizing.count_cuts(dataset)
    if cuts.prompts or cuts.targets:
        prompts = f"{cuts.prompts} of {len(dataset)} prompts cut from the left"
        targets = f"{cuts.targets} targets cut at the end"
        _log(f"{name}: {prompts} and {targets} to fit max_length {config.max_length}")
    return dataset


def _log_lost(name: str, lost: int, count: int, config: RunConfig) -> None:
    if lost:
        _log(
            f"{name}: {lost} of {count} dropped: max_length {config.max_length} leaves them no "
            "prompt or no answer"
        )


def check_rows(rows: Iterable[Row], loaded: Loaded, task: Task) -> None:
    """Check that the task accepts rows that are only used after training."""
    for row in rows:
        task.classified(row) if loaded.kind == CLASSIFICATION else task.example(
            row, loaded.tokenizer
        )


def stream(config: RunConfig, loaded: Loaded, task: Task, path: Path) -> Any:
    """Create a streaming data set from a training file; its first rows are checked first."""
    tried = _expanded(islice(iter_rows(path, "--train"), _TRIED), config, task)
    items = tokenizing.iter_items(tried, task, loaded.tokenizer, loaded.kind, config.max_length)
    lost = [item.lost for item in items]
    if all(lost):
        raise tokenizing.all_lost(config.max_length)
    _log_lost("first training rows", sum(lost), len(lost), config)
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
    """Return the token ids that end a chat prompt, to be stored in the adapter.

    None if the rows are not chats of a causal model. The ids must end every inspected prompt and
    must not occur in any answer. Otherwise, or if the chat template has none, a warning is printed
    and prompt ends are found from the labels.
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
    reason = None
    try:
        template = from_chat_template(loaded.tokenizer)
    except ValueError as error:
        reason, tried = " ".join(str(error).split()), []
    for row, item in zip(
        tried,
        tokenizing.iter_items(tried, task, loaded.tokenizer, CAUSAL, sys.maxsize),
        strict=True,
    ):
        prompt, ids, length = item.labels.count(tokenizing.IGNORED), item.input_ids, len(template)
        ends = [end for end in range(length, len(ids) + 1) if ids[end - length : end] == template]
        if not ends or ends[-1] > prompt:
            where = "ends inside the answer" if ends else "is not in the prompt"
            reason = f"{loaded.tokenizer.decode(template)!r} {where} of {row.where}"
            break
    if reason is None:
        return template
    hint = (
        "the labels tell where prompts end in training, and scoring without labels needs "
        "prompt_lengths"
    )
    _log(f"response_template: none ({reason}); {hint}")
    return None


def sampler(config: RunConfig, dataset: Any, processes: int) -> Any:
    """Return the sampler, ordered by seed and epoch; None for a stream."""
    if not hasattr(dataset, "__len__"):
        return None
    if config.group_by_length:
        return sampling.GroupedSampler(
            dataset["length"], config.batch_size * config.accumulation * processes, config.seed
        )
    return sampling.ShuffledSampler(len(dataset), config.seed)


def collator(config: RunConfig, loaded: Loaded) -> Callable[[Sequence[dict]], dict]:
    """Return the collator: padded, or packed if the model keeps packed examples apart."""
    pad = tokenizing.pad_id(loaded.tokenizer)
    if not config.packing:
        kinds = {SEQ2SEQ: collating.Seq2SeqCollator, CAUSAL: collating.PaddingCollator}
        return kinds.get(loaded.kind, collating.ClassificationCollator)(pad)
    if loaded.kind != CAUSAL:
        raise UserError(f"packing: got true with a {loaded.kind} model, expected a causal one")
    flat = str(getattr(loaded.model.config, "_attn_implementation", "")).startswith(
        "flash_attention"
    )
    packing.check_model_packs(loaded.model, pad, flat)
    return packing.PackingCollator(config.packed_length or config.max_length, pad, flat)
