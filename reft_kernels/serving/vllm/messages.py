"""What the scheduler tells the workers with each step."""

from __future__ import annotations

from typing import Any, NamedTuple

from reft_kernels.serving.steps import Edit

ATTRIBUTE = "reft_news"


class News(NamedTuple):
    """Changes since the last step.

    Attributes:
        edits: Edits of requests that are scheduled for the first time, by request id.
        dropped: Content hashes of adapters that no request and no name needs any more.
    """

    edits: dict[str, Edit]
    dropped: tuple[str, ...]


def attach(scheduler_output: Any, news: News) -> None:
    """Add the news to a ``SchedulerOutput``, which travels to the workers by pickle."""
    setattr(scheduler_output, ATTRIBUTE, news)


def news_of(scheduler_output: Any) -> News | None:
    """Return the news of a ``SchedulerOutput``, or None if there are none."""
    return getattr(scheduler_output, ATTRIBUTE, None)
