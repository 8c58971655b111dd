"""Tasks by name: the paper's four benchmarks, each of their sets, and custom data."""

from __future__ import annotations

import difflib

from reft_train.errors import wrong
from reft_train.tasks.base import Task


def _tasks() -> dict[str, Task]:
    from reft_train.tasks import glue, instruct, jsonl, llm_adapters

    modules = (llm_adapters, instruct, glue, jsonl)
    return {task.name: task for module in modules for task in module.tasks()}


def names() -> list[str]:
    """Return the tasks' names, each mixture before its sets."""
    return list(_tasks())


def get(name: str) -> Task:
    tasks = _tasks()
    if name not in tasks:
        close = difflib.get_close_matches(name, tasks, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise wrong("task", f"{name!r}{meant}", f"one of {', '.join(tasks)}")
    return tasks[name]
