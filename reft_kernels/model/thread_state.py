"""State of the running calls: one for each thread, a stack for nested calls.

Threads, nested calls (an assistant model, a ``generate`` inside a hook) and replicas of data
parallelism each see their own call. Which adapters are active belongs to the model, as in PEFT.
"""

from __future__ import annotations

import threading

from reft_kernels.model.forward_context import ForwardContext
from reft_kernels.model.generation import Generation
from reft_kernels.model.model_call import ModelCall


class Frame:
    """One running call of a backbone: the context that its layer hooks consume, and the frame
    around it.
    """

    __slots__ = ("context", "outer")

    def __init__(self, outer: Frame | None) -> None:
        self.context: ForwardContext | None = None
        self.outer = outer


class EditorState(threading.local):
    """The running call of an editor's model, in one thread."""

    def __init__(self) -> None:  # runs once in each thread
        self.call: ModelCall | None = None
        self.outer: list[tuple[ModelCall | None, Generation | None]] = []
        self.generation: Generation | None = None
        self.members: tuple[str, ...] | None = None


class SessionState(threading.local):
    """The running call of a backbone, in one thread."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
