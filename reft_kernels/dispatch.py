"""Selection of the backend that runs an operator.

The environment variable ``REFT_KERNELS_BACKEND`` (``triton``, ``cuda``, ``cpu`` or ``torch``)
forces a backend; a call that it does not support then raises :class:`BackendError`. Without it, the
first backend in the device's preference list that supports the call is used. Each skipped backend
causes one warning per process, except Triton for fp64, which it does not support.

The operators are registered in Python for all devices and in the native library for CPU tensors.
While a backend other than ``cpu`` is selected for CPU tensors, the native library forwards its
calls to Python.
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

# cuda is used only if forced, because no committed measurement shows it to be faster than triton.
# After the first measurements on a GPU, a backend keeps an operator only where a committed row
# shows it at least 10 % faster than the others; its kernels for the rest are deleted.
_PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")}
_MODULES = {
    "triton": "reft_kernels.triton",
    "cuda": "reft_kernels.cuda",
    "cpu": "reft_kernels.cpu",
    "torch": "reft_kernels.reference",
}


# backends whose functions launch kernels from Python
_LAUNCHING = ("triton", "cuda")


class BackendError(RuntimeError):
    """Raised if the forced backend does not support a call, or if no backend does."""


_lock = threading.Lock()
_forced: str | None = None
_table: dict[tuple[str, str, torch.dtype], Callable | None] = {}
_launched: dict[tuple[str, str, torch.dtype], bool] = {}
direct_calls: dict[tuple, Callable | None] = {}  # entries of ops.direct for the current backends
on_change: list[Callable[[], object]] = []  # called when the forced backend has changed
_warned: set[str] = set()
_native = None  # the module reft_kernels.cpu once its library is loaded
serves_cpu_natively = False  # whether CPU tensors use the native library


def _checked(name: str | None, source: str) -> str | None:
    if name is None or name == "" or name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)} or auto")
    return name


def forced_backend() -> str | None:
    """Return the forced backend, or None if the backend is selected automatically."""
    return _forced


def set_backend(name: str | None) -> None:
    """Force a backend for the whole process.

    Args:
        name: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"torch"``. None or ``"auto"`` restores
            automatic selection.

    Raises:
        ValueError: If ``name`` is not a backend.
    """
    global _forced
    with _lock:
        _forced = _checked(name, "backend")
        _table.clear()
        _launched.clear()
        direct_calls.clear()
        _enable_native()
    for changed in on_change:
        changed()


def load_native() -> None:
    """Load the native CPU library, if it was built.

    This is called once, when the package is imported and no operator can be running yet.
    """
    global _native
    module = importlib.import_module(_MODULES["cpu"])
    if module.load():
        with _lock:
            _native = module
            _enable_native()


def _enable_native() -> None:
    global serves_cpu_natively
    if _native is not None:
        serves_cpu_natively = _is_native()
        _native.set_enabled(serves_cpu_natively)


def _is_native() -> bool:
    """Return whether CPU tensors use the ``cpu`` backend.

    That backend supports either all operators and dtypes or none, so one of them is tested.
    """
    try:
        return choose("edit", "cpu", torch.float32)[0] == "cpu"
    except BackendError:  # raised again by each call of an operator
        return False


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Context manager that forces a backend for the whole process, as :func:`set_backend` does.

    The previous setting is restored on exit.
    """
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def interpreting() -> bool:
    """Return whether Triton runs its kernels in its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def unsupported_reason(
    name: str, operator: str, device_type: str, dtype: torch.dtype
) -> str | None:
    """Return why a backend cannot run an operator.

    Args:
        name: A backend.
        operator: An operator; one of ``OPERATORS``.
        device_type: Device type of the tensors, such as ``"cuda"``.
        dtype: Dtype of the tensors.

    Returns:
        The reason, or None if the backend can run the operator.

    Raises:
        ValueError: If ``operator`` is not an operator.
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
        return f"Triton kernels do not support {device_type} tensors"
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return (
                "Triton kernels need compute capability 8.0 or later, this GPU has "
                f"{capability[0]}.{capability[1]}"
            )
    return None


def choose(operator: str, device_type: str, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """Choose the backend for an operator.

    Args:
        operator: An operator; one of ``OPERATORS``.
        device_type: Device type of the tensors.
        dtype: Dtype of the tensors.

    Returns:
        The name of the backend, and the reason for each preferred backend that cannot be used.

    Raises:
        BackendError: If the forced backend does not support the operator, or no backend does.
    """
    if _forced is not None:
        reason = unsupported_reason(_forced, operator, device_type, dtype)
        if reason is not None:
            raise BackendError(
                f"backend {_forced!r} is forced but cannot run {operator} on {device_type} "
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
    """Return the function that computes an operator for a tensor's device and dtype.

    The function is cached for each operator, device type and dtype.

    Returns:
        The backend's function, or None for the ``cpu`` backend, which is called through PyTorch's
        dispatcher.

    Raises:
        BackendError: If the forced backend does not support the operator, or no backend does.
    """
    key = (operator, tensor.device.type, tensor.dtype)
    try:
        return _table[key]
    except KeyError:
        return _resolve(key)


def is_launched(operator: str, tensor: torch.Tensor) -> bool:
    """Return whether an operator on a tensor like this one runs as kernels launched from Python.

    Raises:
        BackendError: If the forced backend does not support the operator, or no backend does.
    """
    key = (operator, tensor.device.type, tensor.dtype)
    found = _launched.get(key)
    if found is None:
        forced = _forced
        found = choose(*key)[0] in _LAUNCHING
        with _lock:
            if _forced == forced:  # another thread may have changed it
                _launched[key] = found
    return found


def launching(operator: str, device_type: str, dtype: torch.dtype) -> Callable | None:
    """Return the backend's function if the backend launches GPU kernels from Python, else None.

    Raises:
        BackendError: If the forced backend does not support the operator, or no backend does.
    """
    function = _resolve((operator, device_type, dtype))
    return function if choose(operator, device_type, dtype)[0] in _LAUNCHING else None


def keep_direct(key: tuple, function: Callable | None, forced: str | None) -> None:
    """Store an entry of ``direct_calls`` if ``forced`` is still the forced backend."""
    with _lock:
        if _forced == forced:  # another thread may have changed it
            direct_calls[key] = function


def _resolve(key: tuple[str, str, torch.dtype]) -> Callable | None:
    operator, device_type, dtype = key
    forced = _forced
    name, passed_over = choose(operator, device_type, dtype)
    for other, reason in passed_over.items():
        if other not in _warned and not (
            other == "triton" and dtype == torch.float64
        ):  # expected: Triton has no fp64 kernels
            _warned.add(other)
            warnings.warn(
                f"reft_kernels: backend {other!r} is off ({reason}); {name!r} serves instead",
                stacklevel=3,
            )
    function = None if name == "cpu" else getattr(importlib.import_module(_MODULES[name]), operator)
    with _lock:
        if _forced == forced:  # another thread may have changed it
            _table[key] = function
    return function


set_backend(_checked(os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE))
