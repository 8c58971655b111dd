"""Runs code before and after a module, whether it is called or its ``forward`` is called directly.

Hooks run for ``module(...)`` alone, and ``module.forward(...)`` passes them by:
sentence-transformers and some models call it. So the instance's ``forward`` is replaced too, and
runs the same code where no hook has.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from torch import nn

Handle = Any


class Observer(Protocol):
    """What runs around a module's forward."""

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before: returns the arguments to go on with. :meth:`leave` follows in any case."""

    def leave(self, output: Any) -> None:
        """After; ``output`` is None where the forward raised."""


class _Called(threading.local):
    def __init__(self) -> None:
        self.module: nn.Module | None = None


class _Before:
    def __init__(self, forward: InterceptedForward) -> None:
        self.forward = forward

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        # the module, since a replica of data parallelism shares its original's hooks and attributes
        self.forward.called.module = module
        return self.forward.observer.enter(args, kwargs)


class _After:
    def __init__(self, forward: InterceptedForward) -> None:
        self.forward = forward

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.forward.called.module = None
        self.forward.observer.leave(output)


class InterceptedForward:
    """Stands in for one module's ``forward``. An object and not a closure, so that a copied or
    pickled module has its own.
    """

    def __init__(self, module: nn.Module, observer: Observer) -> None:
        self.module = module
        self.observer = observer
        self.replaced = module.__dict__.get("forward")
        self.called = _Called()
        self.handles: list[Handle] = [
            module.register_forward_pre_hook(_Before(self), with_kwargs=True),
            module.register_forward_hook(_After(self), always_call=True),
        ]
        module.__dict__["forward"] = self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "called": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, called=_Called())

    @property
    def __wrapped__(self) -> Any:
        return self._forward_of(self.module)

    def _forward_of(self, module: nn.Module) -> Any:
        return type(module).forward.__get__(module) if self.replaced is None else self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds what it unwraps as a method
            args = args[1:]
        called = self.called.module
        if called is not None:
            self.called.module = None
            return self._forward_of(called)(*args, **kwargs)
        output = None
        try:
            args, kwargs = self.observer.enter(args, kwargs)
            output = self._forward_of(self.module)(*args, **kwargs)
            return output
        finally:
            self.observer.leave(output)

    def remove(self) -> None:
        """Give the module its own ``forward`` back and remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        current = self.module.__dict__.get("forward")
        if getattr(current, "__func__", current) is not self:
            return  # something else wraps it by now, and nothing of ours edits any more
        if self.replaced is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.replaced
