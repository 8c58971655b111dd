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

# values of EditorState.quiet
NEVER = -1
NOT_QUIET = 0
ANNOUNCED = 1  # generate's next call of the model edits nothing
IN_MODEL = 2  # the model runs that call
IN_BACKBONE = 3  # a backbone runs in that call


class Frame:
    """One running call of a backbone.

    Attributes:
        context: the context for its layer hooks; None if nothing is edited.
        outer: the frame of the surrounding call, or None.
        quiet: ``EditorState.quiet`` of the surrounding call.
    """

    __slots__ = ("context", "outer", "quiet")

    def __init__(self, outer: Frame | None, quiet: int) -> None:
        self.context: ForwardContext | None = None
        self.outer = outer
        self.quiet = quiet


class EditorState:
    """The running call of an editor's model, in one thread.

    Attributes:
        call: arguments of the running call.
        outer: (call, generation, quiet) of the surrounding calls.
        generation: the running ``generate``.
        quiet: whether the running call is a decode step that edits nothing; see above.
        members: the adapter of each example, from the argument ``adapter_names``.
    """

    def __init__(self) -> None:
        self.call: ModelCall | None = None
        self.outer: list[tuple[ModelCall | None, Generation | None, int]] = []
        self.generation: Generation | None = None
        self.quiet = NOT_QUIET
        self.members: Members | None = None


class SessionState:
    """The running call of a backbone, in one thread."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
