"""A stand-in for the capture of CUDA graphs on the CPU.

While a :class:`Capture` is active, launches of Triton kernels and operations that fill memory are
recorded with their tensors instead of being run, as during the capture of a CUDA graph; memory that
is allocated holds a sentinel. ``replay`` runs what was recorded, as often as wanted. It needs
Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

_FILLS = {
    torch.ops.aten.zero_.default: lambda tensor: tensor.zero_(),
    torch.ops.aten.fill_.Scalar: lambda tensor, value: tensor.fill_(value),
    torch.ops.aten.copy_.default: lambda tensor, source, *rest: tensor.copy_(source),
}
_ZEROS = (torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default)
_SENTINEL = 0x5A5A5A5A


class Capture(TorchDispatchMode):
    """Records launches within ``with capture:``."""

    def __init__(self) -> None:
        super().__init__()
        self._recorded = []

    def __enter__(self):
        self._run = interpreter.GridExecutor.__call__
        recorded = self._recorded

        def record(executor, *args, **kwargs):
            recorded.append((self._run, (executor, *args), kwargs))

        interpreter.GridExecutor.__call__ = record
        return super().__enter__()

    def __exit__(self, *error):
        interpreter.GridExecutor.__call__ = self._run
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator in _FILLS:
            self._recorded.append((_FILLS[operator], args, {}))
            return args[0]
        result = operator(*args, **kwargs)
        name = operator.overloadpacket.__name__
        if operator in _ZEROS:
            self._recorded.append((torch.Tensor.zero_, (result,), {}))
        elif not (operator.is_view or name.startswith(("empty", "new_empty"))):
            raise AssertionError(f"{name} cannot be captured by this stand-in")
        if not operator.is_view:
            sentinel = float("nan") if result.is_floating_point() else _SENTINEL
            torch.Tensor.fill_(result, sentinel)
        return result

    @property
    def launches(self) -> list[str]:
        """The names of the recorded kernels."""
        return [
            args[0].fn.__name__
            for function, args, _ in self._recorded
            if function not in (*_FILLS.values(), torch.Tensor.zero_)
        ]

    def replay(self) -> None:
        """Run everything that was recorded, in order."""
        for function, args, kwargs in self._recorded:
            function(*args, **kwargs)
