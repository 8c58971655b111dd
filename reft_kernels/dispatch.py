"""Which backend serves which operator on which tensor: one table, one place.

``REFT_KERNELS_BACKEND=triton|cuda|cpu|torch`` forces a backend: forced and unable raises. Unset,
the first able backend of the device's preference list serves, and a choice that costs speed is said
once, as a warning.

The operators are registered from Python for every device, with this table behind them, and from the
native library for CPU tensors. While another backend than ``cpu`` is forced, the library hands its
calls on to the table.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator

import torch

BACKENDS = ("triton", "cuda", "cpu", "torch")
OPERATORS = (
    "edit",
    "edit_backward",
    "red",
    "red_backward",
    "householder",
    "householder_backward",
    "cayley",
    "cayley_backward",
)
ENVIRONMENT_VARIABLE = "REFT_KERNELS_BACKEND"

# cuda stands behind triton by force alone: no committed measurement prefers it yet
_PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")}
_MODULES = {
    "triton": "reft_kernels.triton",
    "cuda": "reft_kernels.cuda",
    "cpu": "reft_kernels.cpu",
    "torch": "reft_kernels.reference",
}


class BackendError(RuntimeError):
    """A backend was forced that cannot serve the call."""


_lock = threading.Lock()
_forced: str | None = None
_table: dict[tuple[str, str, torch.dtype], Callable | None] = {}
_warned: set[str] = set()
_native = None  # reft_kernels.cpu, once its library is loaded


def _checked(name: str | None, source: str) -> str | None:
    if name is None or name == "" or name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)} or auto")
    return name


def forced_backend() -> str | None:
    """The backend that is forced now, by ``set_backend`` or the environment; None when the
    choice is automatic.
    """
    return _forced


def set_backend(name: str | None) -> None:
    """Force a backend for the process (``None`` or ``"auto"``: choose automatically)."""
    global _forced
    with _lock:
        _forced = _checked(name, "backend")
        _table.clear()
        if _native is not None:
            _native.serve(_is_native())


def load_native() -> None:
    """Load the native CPU library where there is one, before any thread can be in a call of an
    operator.
    """
    global _native
    module = importlib.import_module(_MODULES["cpu"])
    if module.load():
        with _lock:
            _native = module
            _native.serve(_is_native())


def _is_native() -> bool:
    """Whether the ``cpu`` backend serves CPU tensors; it does so for every operator and dtype,
    or for none.
    """
    try:
        return choose("edit", "cpu", torch.float32)[0] == "cpu"
    except BackendError:  # the calls say it
        return False


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force a backend within a ``with`` block (process-wide, like ``set_backend``)."""
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def unsupported_reason(
    name: str, operator: str, device_type: str, dtype: torch.dtype
) -> str | None:
    """None when backend ``name`` can serve ``operator`` for tensors of that device type and
    dtype, else the reason.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: got {operator!r}, expected one of {', '.join(OPERATORS)}")
    if name == "torch":
        return None
    if name in ("cpu", "cuda"):
        return importlib.import_module(_MODULES[name]).unsupported_reason(
            operator, device_type, dtype
        )
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype == torch.float64:
        return "Triton kernels accumulate in fp32; fp64 is served by the torch backend"
    if device_type == "cpu" and not interpreting():
        return "Triton needs a GPU (or TRITON_INTERPRET=1, its interpreter, for tests)"
    if device_type not in ("cpu", "cuda"):
        return f"Triton kernels do not serve {device_type} tensors"
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return (
                "Triton kernels need compute capability 8.0 or later, this GPU has "
                f"{capability[0]}.{capability[1]}"
            )
    return None


def choose(operator: str, device_type: str, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The backend that serves, and for each one passed over, why.

    Raises:
        BackendError: the forced backend cannot serve this call.
    """
    if _forced is not None:
        reason = unsupported_reason(_forced, operator, device_type, dtype)
        if reason is not None:
            raise BackendError(
                f"backend {_forced!r} is forced but cannot serve {operator} on {device_type} "
                f"{dtype}: {reason}"
            )
        return _forced, {}
    passed_over: dict[str, str] = {}
    for name in _PREFERENCE.get(device_type, ("torch",)):
        reason = unsupported_reason(name, operator, device_type, dtype)
        if reason is None:
            return name, passed_over
        passed_over[name] = reason
    raise BackendError(f"no backend serves {operator} on {device_type} {dtype}: {passed_over}")


def select(operator: str, tensor: torch.Tensor) -> Callable | None:
    """The function that computes ``operator`` for ``tensor``'s device and dtype; decided once, then
    a dictionary lookup.

    None stands for the ``cpu`` backend, which is called by way of PyTorch's dispatcher.
    """
    key = (operator, tensor.device.type, tensor.dtype)
    try:
        return _table[key]
    except KeyError:
        return _resolve(key)


def _resolve(key: tuple[str, str, torch.dtype]) -> Callable | None:
    operator, device_type, dtype = key
    forced = _forced
    name, passed_over = choose(operator, device_type, dtype)
    for other, reason in passed_over.items():
        if other not in _warned and not (
            other == "triton" and dtype == torch.float64
        ):  # no kernel of it serves fp64
            _warned.add(other)
            warnings.warn(
                f"reft_kernels: backend {other!r} is off ({reason}); {name!r} serves instead",
                stacklevel=3,
            )
    function = None if name == "cpu" else getattr(importlib.import_module(_MODULES[name]), operator)
    with _lock:
        if _forced == forced:  # else another thread has changed it meanwhile
            _table[key] = function
    return function


set_backend(_checked(os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE))
