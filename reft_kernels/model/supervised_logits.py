"""Training forwards that compute the logits of supervised tokens only.

A causal language model computes logits for all tokens of a batch, but its loss reads those whose
next token has a label. While :class:`SupervisedLogits` is open, the hidden states of these tokens
are gathered between the backbone and the output layer, ``[B, T, d]`` to ``[1, N, d]``, and the
model's own loss function receives the N labels as ``shift_labels``. Loss and gradients are the
same sums over the same tokens.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels.model.interception import InterceptedForward
from reft_kernels.model.model_call import argument_names
from reft_kernels.model.per_thread import PerThread
from reft_kernels.positions import IGNORED_LABEL


class SupervisedTokens(NamedTuple):
    """The tokens of one forward whose logits the loss reads.

    Attributes:
        rows: int64 ``[N]``, rows of the hidden state as ``[B * T, d]``.
        targets: ``[1, N]``, the label of the token after each row.
        shape: ``(B, T)`` of the labels.
    """

    rows: Tensor
    targets: Tensor
    shape: tuple[int, int]


def supervised_tokens(labels: Tensor, ignored: int = IGNORED_LABEL) -> SupervisedTokens:
    """Find the tokens whose next token has a label.

    Reads the number of these tokens, which synchronizes an accelerator.

    Args:
        labels: int64 ``[B, T]``.
        ignored: the label of tokens that do not count. If it is the label of all tokens, the
            result is row 0 with this label, because models need at least one token.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=ignored).flatten()
    rows = (targets != ignored).nonzero().squeeze(1)
    if not rows.numel():
        rows = rows.new_zeros(1)
    return SupervisedTokens(rows, targets[rows].unsqueeze(0), (labels.shape[0], labels.shape[1]))


def _loss_calls(forward: Any) -> list[ast.Call]:
    """The calls of ``self.loss_function`` in the source of a ``forward``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "loss_function"
    ]


def _passes_on(call: ast.Call) -> bool:
    """Whether a call of the loss function has the unchanged ``labels`` and ``**kwargs``."""
    named = {k.arg: k.value for k in call.keywords}
    labels = named.get("labels", call.args[1] if len(call.args) > 1 else None)
    return isinstance(labels, ast.Name) and labels.id == "labels" and None in named


def find_causal_lm(model: nn.Module) -> nn.Module:
    """Find the causal language model in ``model`` whose loss can be computed on a subset of tokens.

    Args:
        model: a transformers model, or a wrapper of one (``PeftModel``,
            ``DistributedDataParallel``).

    Raises:
        ValueError: there is none, or its ``forward`` has no ``logits_to_keep``, or it does not pass
            ``shift_labels`` to its loss function.
    """
    found = next((m for m in model.modules() if hasattr(type(m), "loss_function")), None)
    if found is None:
        raise ValueError(
            f"model: got {type(model).__name__}, expected a transformers model with a loss_function"
        )
    reason = _unsupported_reason(found)
    if reason is not None:
        raise ValueError(
            f"model: {type(found).__name__} cannot train on the logits of supervised tokens only: "
            f"{reason}"
        )
    return found


def _unsupported_reason(model: Any) -> str | None:
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    forward = inspect.unwrap(model.forward)
    parameters = inspect.signature(forward).parameters
    if "labels" not in parameters or "logits_to_keep" not in parameters:
        return "its forward has no arguments labels and logits_to_keep"
    try:
        calls = _loss_calls(forward)
    except OSError:
        return "the source of its forward is not available"
    if not calls or not all(_passes_on(call) for call in calls):
        return "its forward does not pass labels and keyword arguments to loss_function"
    if "shift_labels" not in inspect.signature(model.loss_function).parameters:
        return "its loss_function has no argument shift_labels"
    if _backbone(model) is None:
        return "it has no backbone apart from its output layer"
    return None


def _backbone(model: Any) -> nn.Module | None:
    """The module whose output enters the output layer."""
    backbone = getattr(model, "model", None) if model.base_model is model else model.base_model
    return getattr(backbone, "decoder", backbone)  # OPT calls the decoder of its backbone


class _Calls:
    """Supervised tokens of the running calls of one thread, innermost last; None: all logits."""

    def __init__(self) -> None:
        self.tokens: list[SupervisedTokens | None] = []


class _Running:
    """What the interceptions of model and backbone share.

    Attributes:
        threads: the running calls of each thread.
        closed: whether to compute all logits; an interception that other code has wrapped stays.
    """

    def __init__(self) -> None:
        self.threads = PerThread(_Calls)
        self.closed = False

    @property
    def tokens(self) -> list[SupervisedTokens | None]:
        """Supervised tokens of this thread's running calls."""
        return self.threads.here.tokens

    def __getstate__(self) -> dict:
        raise TypeError(
            "a model that computes the logits of supervised tokens only cannot be copied or "
            "pickled; call close() first"
        )


class SupervisedLogits:
    """Computes the logits of supervised tokens only, until :meth:`close`.

    Applies to calls in training mode with gradients and ``labels`` ``[B, T]``. Their output has
    ``logits=None``, so that code which expects logits of all tokens fails instead of reading
    others. Calls in evaluation mode, without gradients or without labels, calls with
    ``logits_to_keep``, ``shift_labels`` or ``return_dict=False``, and calls that ``torch.compile``
    traces compute all logits.

    As a context manager, closes on exit.

    Args:
        model: see :func:`find_causal_lm`.

    Raises:
        ValueError: see :func:`find_causal_lm`; or the model computes supervised logits already.
    """

    def __init__(self, model: nn.Module) -> None:
        causal_lm: Any = find_causal_lm(model)
        outer = causal_lm.__dict__.get("forward")
        while isinstance(outer, InterceptedForward):
            if isinstance(outer.observer, _ModelCalls) and not outer.observer.running.closed:
                raise ValueError(
                    "model: it already computes the logits of supervised tokens only; call "
                    "close() first"
                )
            outer = outer.replaced
        backbone = _backbone(causal_lm)
        assert backbone is not None  # find_causal_lm
        self._running = _Running()
        self._forwards = [
            InterceptedForward(causal_lm, _ModelCalls(causal_lm, self._running)),
            InterceptedForward(backbone, _BackboneCalls(self._running)),
        ]

    def close(self) -> None:
        """Compute all logits again."""
        self._running.closed = True
        for forward in self._forwards:
            forward.remove()
        self._forwards.clear()

    def __enter__(self) -> SupervisedLogits:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _ModelCalls:
    """Selects the tokens before the model runs, and removes their logits from its output."""

    def __init__(self, model: nn.Module, running: _Running) -> None:
        self.model = model
        self.running = running
        self.names = argument_names(model)

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Pass the labels of the supervised tokens as ``shift_labels``."""
        calls = self.running.tokens
        calls.append(None)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self._keeps_all(arguments):
            return args, kwargs
        ignored = arguments.get("ignore_index", IGNORED_LABEL)
        calls[-1] = tokens = supervised_tokens(arguments["labels"], ignored)
        return args, {**kwargs, "shift_labels": tokens.targets}

    def _keeps_all(self, arguments: dict[str, Any]) -> bool:
        """Whether a call computes the logits of all tokens."""
        if self.running.closed or torch.compiler.is_compiling():
            return True
        if not (self.model.training and torch.is_grad_enabled()):
            return True
        labels, keep = arguments.get("labels"), arguments.get("logits_to_keep")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            return True
        if isinstance(keep, Tensor) or keep or arguments.get("shift_labels") is not None:
            return True
        as_dict = arguments.get("return_dict")
        if as_dict is None:
            as_dict = getattr(self.model.config, "return_dict", True)
        return not as_dict

    def leave(self, output: Any) -> Any:
        """Remove the logits."""
        calls = self.running.tokens
        tokens = calls.pop() if calls else None
        if tokens is None or output is None:
            return None
        return type(output)(**{name: v for name, v in output.items() if name != "logits"})


class _BackboneCalls:
    """Gathers the supervised tokens of the backbone's output."""

    def __init__(self, running: _Running) -> None:
        self.running = running

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Do nothing."""
        return args, kwargs

    def leave(self, output: Any) -> Any:
        """Gather the rows of the last hidden state.

        Raises:
            ValueError: the hidden state does not have the shape of the labels.
        """
        calls = self.running.tokens
        tokens = calls[-1] if calls else None
        if tokens is None or output is None:
            return None
        several = isinstance(output, tuple)
        hidden = output[0]
        if tuple(hidden.shape[:2]) != tokens.shape:
            raise ValueError(
                f"labels: got shape {tokens.shape}, expected {tuple(hidden.shape[:2])}, a label "
                "for each token of the last hidden state"
            )
        kept = hidden.flatten(0, 1).index_select(0, tokens.rows.to(hidden.device)).unsqueeze(0)
        if several:
            return (kept, *output[1:])
        first, *_ = output
        return type(output)(**{**output, first: kept})
