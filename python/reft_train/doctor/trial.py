"""Short training on random text through the whole program, and its time over the frozen model's."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from reft_train import models
from reft_train.config import RunConfig
from reft_train.errors import UserError, one_line
from reft_train.files import write_text
from reft_train.tasks.base import Classified, Example, Row, Task
from reft_train.training.outcome import Outcome
from reft_train.training.session import train


class RandomText(Task):
    """Rows of random text, with the outputs of another task."""

    name, recipe, metrics = "trial", "default", ()

    def __init__(self, task: Task) -> None:
        self.decoding, self.labels = task.decoding, task.labels

    def example(self, row: Row, tokenizer: object = None) -> Example:
        """Return two random texts."""
        return Example(row.fields["text"], row.fields["target"], "")

    def classified(self, row: Row) -> Classified:
        """Return a random text and label."""
        label = row.fields["label"]
        return Classified(row.fields["text"], None, label if self.labels is None else int(label))


@dataclass(frozen=True)
class Trial:
    """Measurements of a trial; ``failure`` is a one-line reason, None if it succeeded.

    Attributes:
        length: tokens of an example.
        ratio: time of a training step over the frozen model's forward and backward.
    """

    steps: int
    length: int
    outcome: Outcome | None = None
    frozen_seconds: float | None = None
    ratio: float | None = None
    failure: str | None = None


def run_trial(config: RunConfig, task: Task, steps: int, length: int) -> Trial:
    """Train ``steps`` timed steps of one forward each, then time the frozen model."""
    task, count, labels = RandomText(task), config.batch_size, task.num_labels
    words, rows = random.Random(config.seed), []
    for _ in range(count):
        text, target = (" ".join(map(str, words.choices(range(10_000), k=length))) for _ in "ab")
        label = words.random() * labels
        rows.append(json.dumps({"text": text, "target": target[: length // 2], "label": label}))
    # the time of a step is that between two ends
    settings = {"max_steps": steps + 1, "save_every": steps + 2, "log_every": steps}
    settings |= {
        "accumulation": 1,
        "validation": 0,
        "select": "none",
        "streaming": False,
        "skip_test": True,
    }
    settings |= {"max_length": length, "resume": False, "overwrite": False}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = str(write_text(Path(folder) / "rows.jsonl", "\n".join(rows)))
            places = {"train": path, "output": f"{folder}/run", "cache": folder}
            outcome = train(config.replace(**settings, **places), report=False, task=task)
        frozen = frozen_seconds(config, task, steps, length)
    except UserError:  # bad input is not a failed step
        raise
    except (RuntimeError, ValueError, TypeError, MemoryError, FloatingPointError) as error:
        failure = f"{type(error).__name__}: {one_line(error)}"
        return Trial(steps, length, failure=failure)
    return Trial(steps, length, outcome, frozen, outcome.step_seconds / frozen)


def frozen_seconds(config: RunConfig, task: Task, steps: int, length: int) -> float:
    """Return the median time of a forward and backward through every frozen layer."""
    device = torch.device(models.pick_device(config))
    loaded = models.load(config, task)
    model = loaded.model.train()
    if config.device_map == "none" and config.quantization == "none":
        model.to(device)
    for embedding in (m for m in model.modules() if isinstance(m, torch.nn.Embedding)):
        embedding.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (config.batch_size, length)).to(device)
    labels = ids
    if loaded.kind == models.CLASSIFICATION:
        labels = torch.zeros_like(ids[:, 0], dtype=torch.float32 if task.labels is None else None)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first allocates memory
