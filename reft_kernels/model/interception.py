"""Runs code before and after a module, also if its ``forward`` is called directly.

Module hooks run for ``module(...)`` only. sentence-transformers and some models call
``module.forward(...)``, so the instance's ``forward`` is replaced as well; it runs the same code
unless a hook already did.

A decode step of ``generate`` that edits nothing is announced beforehand
(:mod:`reft_kernels.model.generate_wrappers`); of such a call these hooks do no more than read the
announcement.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from reft_kernels.model.per_thread import PerThread
from reft_kernels.model.thread_state import ANNOUNCED, NEVER, NOT_QUIET, EditorState

Handle = Any


class Observer(Protocol):
    """Code that runs before and after a module's forward."""

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Run before the forward.

        Returns:
            The arguments for the forward. :meth:`leave` is called even if this method raises.
        """

    def leave(self, output: Any) -> Any:
        """Run after the forward; ``output`` is None if it raised.

        Returns:
            The output to return instead; None to return ``output``.
        """


class HasThreads(Protocol):
    """The interface of the editor that an intercepted forward uses."""

    threads: PerThread[EditorState]


class _Calls:
    """The calls of one module in one thread.

    Attributes:
        module: the module whose hooks have run, before its ``forward``.
        quiet: of each running call, whether it was announced to edit nothing.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.quiet: list[bool] = []


class InterceptedForward:
    """Replaces ``forward`` of one module and registers its hooks.

    An object rather than a closure, so that a copied or pickled module refers to the copy.

    Args:
        module: the module to intercept.
        observer: the code to run.
        editor: the editor of the model; None if every call must be observed.
        quiet_from: value of ``EditorState.quiet`` at which a call need not be observed.
    """

    def __init__(
        self,
        module: nn.Module,
        observer: Observer,
        editor: HasThreads | None = None,
        quiet_from: int = NEVER,
    ) -> None:
        self.module = module
        self.observer = observer
        self.editor = editor
        self.quiet_from = quiet_from
        self.replaced = module.__dict__.get("forward")
        self.threads = PerThread(_Calls)
        self.handles: list[Handle] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]
        module.__dict__["forward"] = self

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        calls, editor = self.threads.here, self.editor
        # not self.module: replicas of nn.DataParallel share the hooks of the original
        calls.module = module
        if editor is not None and editor.threads.here.quiet == self.quiet_from:
            editor.threads.here.quiet += 1
            calls.quiet.append(True)
            return None
        calls.quiet.append(False)
        return self.observer.enter(args, kwargs)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        calls, editor = self.threads.here, self.editor
        calls.module = None
        if calls.quiet and calls.quiet.pop() and editor is not None:
            # after the model's own hook nothing is left to do for the backbone's
            over = self.quiet_from == ANNOUNCED or not editor.threads.here.quiet
            editor.threads.here.quiet = NOT_QUIET if over else self.quiet_from
            return None
        return self.observer.leave(output)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "threads": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, threads=PerThread(_Calls))

    @property
    def __wrapped__(self) -> Any:
        return (
            type(self.module).forward.__get__(self.module)
            if self.replaced is None
            else self.replaced
        )

    def _run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        # the function of the class: after a graph break torch.compile looks up a bound method by
        # its name on the module, which finds this wrapper again
        return type(module).forward(module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds an unwrapped forward as a method
            args = args[1:]
        calls = self.threads.here
        called = calls.module
        if called is not None:
            calls.module = None
            return self._run(called, args, kwargs)
        output = None
        replaced = None
        try:
            observed = self._before(self.module, args, kwargs)
            calls.module = None
            args, kwargs = (args, kwargs) if observed is None else observed
            output = self._run(self.module, args, kwargs)
        finally:
            replaced = self._after(self.module, args, output)
        return output if replaced is None else replaced

    def remove(self) -> None:
        """Restore the module's ``forward`` and remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        current = self.module.__dict__.get("forward")
        if getattr(current, "__func__", current) is not self:
            return  # wrapped by other code since; without hooks this wrapper does nothing
        if self.replaced is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.replaced
