"""Tasks by name: the paper's four benchmarks, each of their sets, and custom data."""

from __future__ import annotations

from reft_train.errors import wrong
from reft_train.tasks.base import Task
from reft_train.tasks.glue import SETS, Glue
from reft_train.tasks.instruct import Instruct
from reft_train.tasks.jsonl import Jsonl
from reft_train.tasks.llm_adapters import ARITHMETIC, COMMONSENSE, Arithmetic, Commonsense

_TASKS: list[Task] = [
    Commonsense("commonsense", None, tuple(COMMONSENSE)),
    *(Commonsense(name, labels, (name,)) for name, labels in COMMONSENSE.items()),
    Arithmetic("math", ARITHMETIC),
    *(Arithmetic(name, (name,)) for name in ARITHMETIC),
    Instruct(),
    *map(Glue, SETS),
    Jsonl(),
]
TASKS = {task.name: task for task in _TASKS}  # each mixture before its sets


def get(name: str) -> Task:
    if name not in TASKS:
        raise wrong("task", repr(name), f"one of {', '.join(TASKS)}")
    return TASKS[name]
