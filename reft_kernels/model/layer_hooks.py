"""Forward hooks that edit the input or output of a module."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from reft_kernels.model.components import Target
from reft_kernels.model.forward_context import ForwardContext, unexpected_output
from reft_kernels.model.interception import HasThreads
from reft_kernels.model.per_thread import PerThread
from reft_kernels.model.thread_state import SessionState


class ContextSource(Protocol):
    """The interface of a backbone's session that hooks use."""

    threads: PerThread[SessionState]

    @property
    def editor(self) -> HasThreads: ...

    def recomputed_context(self) -> ForwardContext | None:
        """The context of the forward whose layers the running backward recomputes."""


class LayerHook:
    """The hook of one site.

    Args:
        session: the session of the backbone that contains the module.
        site: number of the site.
        target: the target of the site.
    """

    def __init__(self, session: ContextSource, site: int, target: Target) -> None:
        self.session = session
        self.site = site
        self.target = target


class OutputHook(LayerHook):
    """Forward hook that edits the module's output, or the first element of a tuple or list."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        session = self.session
        if session.editor.threads.here.quiet:
            return None
        frame = session.threads.here.frame
        context = frame.context if frame is not None else session.recomputed_context()
        if context is None:
            return None
        target = self.target
        several = isinstance(output, tuple | list) and len(output) > 0
        hidden = output[0] if several else output
        # a module may return its input, which others still read
        fresh = target.inplace and not (args and hidden is args[0])
        edited = context.apply(self.site, hidden, fresh, target)
        if not several:
            return edited
        return (edited, *output[1:]) if isinstance(output, tuple) else [edited, *output[1:]]


class InputHook(LayerHook):
    """Forward pre-hook that edits the module's first tensor argument, positional or keyword."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        session = self.session
        if session.editor.threads.here.quiet:
            return None
        frame = session.threads.here.frame
        context = frame.context if frame is not None else session.recomputed_context()
        if context is None:
            return None
        for index, value in enumerate(args):
            if isinstance(value, Tensor):
                edited = context.apply(self.site, value, False, self.target)
                return (*args[:index], edited, *args[index + 1 :]), kwargs
        names = ("hidden_states", *kwargs)
        name = next((n for n in names if isinstance(kwargs.get(n), Tensor)), None)
        if name is None:
            raise unexpected_output(None, self.target)
        edited = context.apply(self.site, kwargs[name], False, self.target)
        return args, {**kwargs, name: edited}
