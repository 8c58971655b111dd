"""State of running calls: one per thread, with a stack for nested calls.

Threads, nested calls (an assistant model, a ``generate`` inside a hook) and replicas of
``nn.DataParallel`` each have their own state. The active adapters are a property of the model, as
in PEFT.
"""

from __future__ import annotations

from reft_kernels.model.forward_context import ForwardContext
from reft_kernels.model.generation import Generation
from reft_kernels.model.members import Members
from reft_kernels.model.model_call import ModelCall


class Frame:
    """One running call of a backbone.

    Attributes:
        context: the context for its layer hooks; None if nothing is edited.
        outer: the frame of the surrounding call, or None.
    """

    __slots__ = ("context", "outer")

    def __init__(self, outer: Frame | None) -> None:
        self.context: ForwardContext | None = None
        self.outer = outer


class EditorState:
    """The running call of an editor's model, in one thread.

    Attributes:
        call: arguments of the running call.
        outer: (call, generation) of the surrounding calls.
        generation: the running ``generate``.
        members: the adapter of each example, from the argument ``adapter_names``.
    """

    def __init__(self) -> None:
        self.call: ModelCall | None = None
        self.outer: list[tuple[ModelCall | None, Generation | None]] = []
        self.generation: Generation | None = None
        self.members: Members | None = None


class SessionState:
    """The running call of a backbone, in one thread."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
