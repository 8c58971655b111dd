"""Argument checks of the public functions.

Shapes, dtypes and devices are checked on every call; this needs no synchronization. The values of
``rows`` and ``weight_ids`` are checked once per tensor, and the result is stored in the tensor's
``_reft_checked`` attribute. Tensors built by :mod:`reft_kernels.positions` are valid by
construction and are marked as checked when they are created.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reft_kernels.activations import canonical_activation
from reft_kernels.orthonormal import MAX_RANK

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHECKED = "_reft_checked"  # tensor attribute: (num_rows, version) of the last value check
_ASSERTED = "_reft_asserted"  # tensor attribute: (low, high, version) of the last assertion


def describe(value: object) -> str:
    """Format a value for an error message.

    Returns:
        The shape, dtype and device of a tensor; the type and ``repr`` of any other value.
    """
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}, {value.dtype}, {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``; raise ValueError if it is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
    return value


def check_count(name: str, value: int, low: int, high: int | None) -> int:
    """Return ``value``; raise ValueError unless it is an int in [low, high] (None: no limit)."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        bounds = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"{name}: got {value!r}, expected {bounds}")
    return value


def _check_hidden(hidden: Tensor) -> None:
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden: got {describe(hidden)}, expected a tensor [..., d]")
    if hidden.dtype not in HIDDEN_DTYPES:
        raise TypeError(
            f"hidden: got dtype {hidden.dtype}, expected one of "
            f"{', '.join(map(str, HIDDEN_DTYPES))}"
        )
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected [..., d] with d >= 1")


def _check_weight(name: str, weight: Tensor | None, shape: tuple[int, ...], hidden: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: got {describe(weight)}, expected a tensor of shape {shape}")
    if weight.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected {shape}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{name}: got dtype {weight.dtype}, expected a floating-point dtype")
    if weight.device != hidden.device:
        raise ValueError(
            f"{name}: got device {weight.device}, expected {hidden.device}, where hidden is"
        )


def has_shared_elements(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is expanded, so that several of its elements share memory."""
    return 0 in tensor.stride() and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def check_writable(hidden: Tensor, graph: bool) -> None:
    """Check that ``hidden`` may be edited in place.

    Autograd reports these errors only after the operator has written to the tensor, so they are
    checked here first. Nothing is checked while ``torch.compile`` traces.

    Args:
        hidden: The tensor to edit.
        graph: Whether the edit will be recorded for a backward pass.

    Raises:
        ValueError: If ``hidden`` is expanded, or if ``graph`` is true and ``hidden`` is a leaf that
            requires grad, a view of such a leaf, a view that autograd cannot rebase, or an
            inference tensor.
    """
    if torch.compiler.is_compiling():
        return
    reason = None
    if has_shared_elements(hidden):
        reason = "an expanded tensor, several of whose elements share memory"
    elif graph and hidden.is_inference():
        reason = "an inference tensor"
    elif graph and hidden.is_leaf and hidden.requires_grad:
        reason = "a leaf that requires grad"
    elif graph and hidden._is_view():
        base = hidden._base
        if base is not None and base.is_leaf and base.requires_grad:
            reason = "a view of a leaf that requires grad"
        elif (
            torch._C._autograd._get_creation_meta(hidden) != torch._C._autograd.CreationMeta.DEFAULT
        ):
            reason = (
                "a view that autograd cannot follow (of several outputs, or made without gradients)"
            )
    if reason is not None:
        raise ValueError(
            f"hidden: got {reason}, expected inplace=False or a tensor that may be edited in "
            "place, as by hidden.mul_"
        )


def num_rows_of(hidden: Tensor) -> int:
    """Return M, the number of rows of ``hidden.view(-1, d)``."""
    return hidden.numel() // hidden.shape[-1]


def _check_index(name: str, index: Tensor, hidden: Tensor, length: int | None) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: got {describe(index)}, expected an int32 tensor [N]")
    if index.dtype != torch.int32:
        raise TypeError(f"{name}: got dtype {index.dtype}, expected torch.int32")
    if index.dim() != 1 or (length is not None and index.shape[0] != length):
        raise ValueError(
            f"{name}: got shape {tuple(index.shape)}, expected "
            f"[{'N' if length is None else length}]"
        )
    if index.device != hidden.device:
        raise ValueError(
            f"{name}: got device {index.device}, expected {hidden.device}, where hidden is"
        )


def _version(index: Tensor) -> int:
    """Return the tensor's version counter, or -1 for an inference tensor, which has none."""
    return -1 if index.is_inference() else index._version


def mark_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Mark ``rows`` as checked.

    Args:
        rows: int32 tensor whose values lie in [-1, ``num_rows``) and, apart from -1, are distinct.
        num_rows: Exclusive upper bound of the values.

    Returns:
        ``rows`` itself.
    """
    if not torch.compiler.is_compiling():
        setattr(rows, _CHECKED, (num_rows, _version(rows)))
    return rows


def is_marked(index: Tensor, limit: int) -> bool:
    """Return whether ``index`` was checked against ``limit`` or less and is unchanged since."""
    mark = getattr(index, _CHECKED, None)
    return mark is not None and mark[0] <= limit and mark[1] == _version(index)


def are_rows_known(rows: Tensor, num_rows: int) -> bool:
    """Return whether the values of ``rows`` were checked for ``num_rows`` and are unchanged since.

    True also for a GPU tensor whose range is asserted on the device.
    """
    if rows.is_inference():
        return False
    mark = getattr(rows, _CHECKED, None)
    if mark is not None and mark[0] <= num_rows:
        return mark[1] == rows._version
    return rows.is_cuda and getattr(rows, _ASSERTED, None) == (-1, num_rows, rows._version)


def assert_range(name: str, index: Tensor, low: int, high: int) -> None:
    """Assert on the device, without synchronizing, that ``index`` lies in ``[low, high)``.

    Each tensor is asserted once. Tensors that :func:`check_row_values` has checked are skipped, and
    so is every call while a CUDA graph is captured.
    """
    if (
        torch.compiler.is_compiling()
        or index.numel() == 0
        or torch.cuda.is_current_stream_capturing()
    ):
        return
    asserted = getattr(index, _ASSERTED, None)
    if is_marked(index, high) or asserted == (low, high, _version(index)):
        return
    least, most = torch.aminmax(index)
    torch._assert_async(
        (least >= low) & (most < high), f"{name}: expected numbers in [{low}, {high})"
    )
    if not index.is_inference():
        setattr(index, _ASSERTED, (low, high, index._version))


def check_row_values(rows: Tensor, num_rows: int, name: str = "rows") -> Tensor:
    """Check that row numbers are in range and distinct.

    Synchronizes the first time a given GPU tensor is checked. Nothing is checked while
    ``torch.compile`` traces or a CUDA graph is captured.

    Args:
        rows: int32 ``[N]``; -1 marks an entry to skip.
        num_rows: Exclusive upper bound of the row numbers.
        name: Argument name for error messages.

    Returns:
        ``rows`` itself, marked as checked unless it is an inference tensor.

    Raises:
        ValueError: If an entry is below -1 or at least ``num_rows``, or if a row number other than
            -1 occurs more than once.
    """
    if torch.compiler.is_compiling() or (rows.is_cuda and torch.cuda.is_current_stream_capturing()):
        return rows
    if is_marked(rows, num_rows):
        return rows
    if rows.numel():
        low, high = (int(v) for v in torch.stack(torch.aminmax(rows)).tolist())
        if low < -1 or high >= num_rows:
            raise ValueError(
                f"{name}: got values from {low} to {high}, expected row numbers in [0, "
                f"{num_rows}), or -1 to skip an entry"
            )
        ordered = rows.sort().values
        repeated = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
        if bool(repeated.any()):
            raise ValueError(
                f"{name}: row {int(ordered[1:][repeated][0])} occurs more than once, expected "
                "each row at most once"
            )
    return rows if rows.is_inference() else mark_rows(rows, num_rows)


def check_weight_id_values(weight_ids: Tensor, sets: int, name: str = "weight_ids") -> None:
    """Check that weight set numbers are in range; cached like :func:`check_row_values`.

    Args:
        weight_ids: int32 ``[N]``.
        sets: S, the number of weight sets.
        name: Argument name for error messages.

    Raises:
        ValueError: If an entry is below 0 or at least ``sets``.
    """
    if torch.compiler.is_compiling() or (
        weight_ids.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return
    if is_marked(weight_ids, sets):
        return
    if weight_ids.numel():
        low, high = (int(v) for v in torch.stack(torch.aminmax(weight_ids)).tolist())
        if low < 0 or high >= sets:
            raise ValueError(
                f"{name}: got values from {low} to {high}, expected set numbers in [0, {sets})"
            )
    if not weight_ids.is_inference():
        mark_rows(weight_ids, sets)


def _check_selection(
    hidden: Tensor, rows: Tensor | None, weight_ids: Tensor | None, sets: int | None
) -> int:
    """Check ``rows`` and ``weight_ids``; return the number of selected rows.

    ``sets`` is the number of weight sets; it is not None when ``weight_ids`` is not None.
    """
    total = num_rows_of(hidden)
    count = total
    if rows is not None:
        _check_index("rows", rows, hidden, None)
        check_row_values(rows, total)
        count = rows.shape[0]
    if weight_ids is not None:
        assert sets is not None
        _check_index("weight_ids", weight_ids, hidden, count)
        check_weight_id_values(weight_ids, sets)
    return count


def check_edit(
    hidden: Tensor,
    weights: Mapping[str, Tensor | None],
    biases: Mapping[str, Tensor | None],
    rows: Tensor | None,
    activation: str | None,
    coeff: Tensor | None,
    weight_ids: Tensor | None,
) -> str:
    """Check the arguments of a low-rank edit.

    Args:
        hidden: ``[..., d]``.
        weights: Matrices by argument name, each ``[r, d]`` or ``[S, r, d]``. The first one
            determines r and S.
        biases: Vectors by argument name, each ``[r]`` or ``[S, r]``.
        rows: int32 ``[N]`` or None.
        activation: Name or alias of an activation; None means linear.
        coeff: ``[N, r]`` or None.
        weight_ids: int32 ``[N]`` or None. The weights have a dimension S if and only if it is
            given.

    Returns:
        The canonical name of the activation.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or values.
    """
    _check_hidden(hidden)
    activation = canonical_activation(activation)
    first, reference = next(iter(weights.items()))
    rank_dims = 2 if weight_ids is None else 3
    d = hidden.shape[-1]
    if not isinstance(reference, Tensor):
        raise TypeError(f"{first}: got {describe(reference)}, expected a tensor [r, {d}]")
    if reference.dim() != rank_dims or reference.shape[-1] != d:
        layout = (
            f"[r, {d}] (no weight_ids)" if weight_ids is None else f"[S, r, {d}] (with weight_ids)"
        )
        raise ValueError(f"{first}: got shape {tuple(reference.shape)}, expected {layout}")
    r = reference.shape[-2]
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"{first}: got rank r = {r}, expected 1 <= r <= {MAX_RANK}")
    shape = tuple(reference.shape)
    for name, weight in weights.items():
        _check_weight(name, weight, shape, hidden)
    for name, bias in biases.items():
        _check_weight(name, bias, shape[:-1], hidden)
    count = _check_selection(hidden, rows, weight_ids, shape[0] if weight_ids is not None else None)
    if coeff is not None:
        _check_weight("coeff", coeff, (count, r), hidden)
    return activation


def check_red(
    hidden: Tensor, scale: Tensor, bias: Tensor, rows: Tensor | None, weight_ids: Tensor | None
) -> None:
    """Check the arguments of :func:`reft_kernels.red`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or values.
    """
    _check_hidden(hidden)
    d = hidden.shape[-1]
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale: got {describe(scale)}, expected a tensor [{d}]")
    if weight_ids is not None and scale.dim() != 2:
        raise ValueError(
            f"scale: got shape {tuple(scale.shape)}, expected [S, {d}] (with weight_ids)"
        )
    shape = (d,) if weight_ids is None else (scale.shape[0], d)
    _check_weight("scale", scale, shape, hidden)
    _check_weight("bias", bias, shape, hidden)
    _check_selection(hidden, rows, weight_ids, shape[0] if weight_ids is not None else None)
