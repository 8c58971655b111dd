"""Data preparation of a run: reading, splitting, tokenizing and batching rows."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState

from reft_kernels.integrations.peft import from_chat_template
from reft_train.config import REFT_METHODS, RunConfig
from reft_train.data import collating, reading, sampling, tokenizing
from reft_train.data.reading import iter_rows, read_rows
from reft_train.data.tokenizing import Encoder, expanded
from reft_train.errors import one_line, wrong
from reft_train.models import CAUSAL, Loaded
from reft_train.tasks.base import Row, Task
from reft_train.tasks.glue import Glue, selection_rows

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

    def digest(self) -> str:
        """Hash the training rows; for a stream, which is not read here, use the file size."""
        return f"{self.stream.stat().st_size} bytes" if self.stream else _digest(self.train)


def _split(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draw ``count`` rows by seed; return them and the others, each in the order of the file."""
    if not 0 < count < len(rows):
        what = f"{count} of {len(rows)} training rows"
        raise wrong("validation", what, "at least one on either side")
    order = list(range(len(rows)))
    random.Random(f"validation/{seed}").shuffle(order)
    return [rows[i] for i in sorted(order[:count])], [rows[i] for i in sorted(order[count:])]


def find_rows(config: RunConfig, task: Task, *, train: bool = True) -> Rows:
    """Read a run's rows. Held-out rows come from the training set (for GLUE, from validation).

    Args:
        train: whether training rows are needed; False for evaluation only.
    """
    scored, glue, streams = not config.skip_test, isinstance(task, Glue), train and config.streaming
    rows = Rows([])
    data, path = (None if name is None else Path(name) for name in (config.data, config.train))
    needed = {"train_needed": train, "tests_needed": not train}
    train_file, test_files = reading.find(task, data, path, list(map(Path, config.test)), **needed)
    if scored or (glue and not streams):
        rows.tests = {name: read_rows(path, "--test") for name, path in test_files.items()}
    if streams:
        rows.train, rows.stream = None, train_file
    elif train:
        rows.train = read_rows(train_file, "--train")
    if glue and rows.tests and not streams:
        # as in the paper: one part of validation selects, the rest is reported
        name, tests = next(iter(rows.tests.items()))
        count = selection_rows(len(tests))
        rows.held_out, rows.tests[name] = _split(tests, count, config.seed)
    if train and not streams:
        rows.train = rows.train[: config.train_rows]
        if held := config.validation:
            count = round(len(rows.train) * held) if held < 1 else int(held)
            rows.held_out, rows.train = _split(rows.train, count, config.seed)
        # split before expanding, so that a conversation stays on one side
        rows.train = list(expanded(rows.train, task, config.turns))
        rows.held_out = list(expanded(rows.held_out, task, config.turns))
    limit = config.test_rows
    rows.tests = {name: tests[:limit] for name, tests in rows.tests.items() if scored}
    return rows


def _digest(rows: list[Row]) -> str:
    """Hash the rows' content, so that a changed file, split or limit gives a different data set."""
    fields = json.dumps([dict(row.fields) for row in rows], sort_keys=True, default=str)
    return hashlib.sha256(fields.encode()).hexdigest()


def _log(text: str) -> None:
    if PartialState().is_main_process:
        print(text, file=sys.stderr)


def tokenized(config: RunConfig, encoder: Encoder, rows: list[Row], name: str) -> Any:
    """Tokenize the rows, or load them from the cache if the same rows were tokenized before."""
    folder = None if config.cache is None else Path(config.cache)
    dataset = tokenizing.tokenize_rows(rows, encoder, {"rows": _digest(rows)}, folder)
    _log_lost(name, len(rows) - len(dataset), len(rows), config)
    cuts = ("cut_prompt", "cut_target")
    prompts, targets = (sum(cut > 0 for cut in dataset[column]) for column in cuts)
    if prompts or targets:
        cut = f"{prompts} of {len(dataset)} prompts and {targets} targets truncated"
        _log(f"{name}: {cut} to max_length {config.max_length}")
    return dataset


def _log_lost(name: str, lost: int, count: int, config: RunConfig) -> None:
    if lost:
        reason = f"max_length {config.max_length} leaves them no prompt or no answer"
        _log(f"{name}: {lost} of {count} dropped: {reason}")


def stream(config: RunConfig, encoder: Encoder, path: Path) -> Any:
    """Create a streaming data set from a training file; its first rows are checked first."""
    tried = expanded(islice(iter_rows(path, "--train"), _TRIED), encoder.task, config.turns)
    lost = [item.lost for item in encoder.items(tried)]
    if all(lost):
        raise tokenizing.all_lost(config.max_length)
    _log_lost("first training rows", sum(lost), len(lost), config)
    order = {"seed": config.seed, "buffer": config.shuffle_buffer, "workers": config.workers}
    return tokenizing.streamed(path, encoder, **order, turns=config.turns)


def response_template(config: RunConfig, encoder: Encoder, rows: Rows) -> list[int] | None:
    """Return the token ids that end a chat prompt, to be stored in the adapter.

    None if the rows are not chats of a causal model. The ids must end every inspected prompt and
    must not occur in any answer. Otherwise, or if the chat template has none, a warning is printed
    and prompt ends are found from the labels.
    """
    tokenizer = encoder.tokenizer
    if encoder.kind != CAUSAL or config.method not in REFT_METHODS or not tokenizer.chat_template:
        return None
    file_rows = iter_rows(rows.stream, "--train") if rows.train is None else rows.train
    tried = list(islice(expanded(file_rows, encoder.task, config.turns), _TRIED // 10))
    if not tried or not all("messages" in row.fields for row in tried):
        return None
    try:
        template, reason = from_chat_template(tokenizer), None
    except ValueError as error:
        template, reason, tried = [], one_line(error), []
    whole = replace(encoder, max_length=sys.maxsize)
    for row, item in zip(tried, whole.items(tried), strict=True):
        prompt, ids, length = item.labels.count(tokenizing.IGNORED), item.input_ids, len(template)
        ends = [end for end in range(length, len(ids) + 1) if ids[end - length : end] == template]
        if not ends or ends[-1] > prompt:
            where = "ends inside the answer" if ends else "is not in the prompt"
            reason = f"{tokenizer.decode(template)!r} {where} of {row.where}"
            break
    if reason is None:
        return template
    hint = "training finds prompt ends from labels; scoring without labels needs prompt_lengths"
    _log(f"response_template: none ({reason}); {hint}")
    return None


def sampler(config: RunConfig, dataset: Any, processes: int) -> Any:
    """Return the sampler, ordered by seed and epoch; None for a stream."""
    if not hasattr(dataset, "__len__"):
        return None
    if config.group_by_length:
        group = config.batch_size * config.accumulation * processes
        return sampling.GroupedSampler(dataset["length"], group, config.seed)
    return sampling.ShuffledSampler(len(dataset), config.seed)


def collator(config: RunConfig, loaded: Loaded) -> Callable[[Sequence[dict]], dict]:
    """Return the collator: padded, or packed if the model keeps packed examples apart."""
    pad = loaded.tokenizer.pad_token_id
    if not config.packing:
        return collating.PaddingCollator(pad)
    if loaded.kind != CAUSAL:
        raise wrong("packing", f"true with a {loaded.kind} model", "a causal one")
    attention = str(getattr(loaded.model.config, "_attn_implementation", ""))
    flat = attention.startswith("flash_attention")
    collating.check_model_packs(loaded.model, pad, flat)
    return collating.PackingCollator(config.packed_length or config.max_length, pad, flat)
