"""Drop-in replacements for the trainable interventions of pyreft and pyvene.

Names, keyword arguments, attributes and state dicts are those of the originals. Each forward is one
edit operator, plus one build of R if it is orthonormal. Differences from the originals:

    subspaces   Select columns of R for each example, as in pyreft's notebooks; pyreft's classes
                ignore them. There is also ``subspace_coeff``.
    dropout     Follows ``reft_model.train()`` and ``reft_model.eval()``. In the originals it stays
                enabled, because pyvene does not forward these calls.
    R           Remains orthonormal under weight decay, is restored exactly, and needs no d x d
                base in memory.
    checkpoint  Stores ``dropout`` and ``act_fn`` in the metadata of the state dict. Loading it
                restores them and the dtype, unless they were passed to the constructor.
    base        May have another dtype than ``learned_source``. Sums are accumulated in fp32.

Sources: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models"; Wu et al. 2024,
"pyvene: A Library for Understanding and Improving PyTorch Models via Interventions"; Geiger et al.
2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
Representations" (DAS).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyvene import (
    DistributedRepresentationIntervention,
    SourcelessIntervention,
    TrainableIntervention,
)
from torch import Tensor, nn
from transformers.activations import ACT2FN

from reft_kernels.activations import ACTIVATIONS, canonical_activation
from reft_kernels.checks import describe
from reft_kernels.integrations.pyreft.fused import SETTINGS, FusedIntervention
from reft_kernels.interventions import EditWeights


def _activation(act_fn: str | None) -> str:
    """Return the canonical activation name of an ``act_fn``; raise ValueError if unsupported."""
    try:
        known = act_fn is None or act_fn in ACT2FN
        return canonical_activation(act_fn if known else "")
    except (TypeError, ValueError):
        raise ValueError(
            f"act_fn: got {act_fn!r}, expected None or a name of transformers' ACT2FN for one of "
            f"{', '.join(ACTIVATIONS)}"
        ) from None


class ReftIntervention(
    FusedIntervention,
    SourcelessIntervention,
    TrainableIntervention,
    DistributedRepresentationIntervention,
):
    """Base class of pyreft's interventions.

    Args:
        dropout: Dropout probability, applied to the edited hidden states.
        act_fn: Name of an activation in transformers' ``ACT2FN``.
        dtype: dtype of the linear layers, by default bf16 as in the originals.
        **kwargs: See :class:`FusedIntervention`.
    """

    drops = True  # whether the original has dropout
    activates = True  # whether the original has act_fn

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_last_dim": True, **kwargs})
        self._begin(kwargs)
        self._make_layers(kwargs)
        if self.drops:
            self.dropout = nn.Dropout(0.0 if kwargs.get("dropout") is None else kwargs["dropout"])
        if self.activates:
            self._set_act_fn(kwargs.get("act_fn"))

    def _make_layers(self, kwargs: dict) -> None:
        """Create the parameters."""
        raise NotImplementedError

    def _set_act_fn(self, name: str | None) -> None:
        self._activation = _activation(name)
        self._act_fn_name = name or "linear"
        self.act_fn = ACT2FN[self._act_fn_name]
        self._act_fn_type = type(self.act_fn)

    def edit_weights(self) -> EditWeights:
        """Return the weights of the edit; R is computed from the current parameters."""
        raise NotImplementedError

    def forward(
        self, base: Tensor, source: None = None, subspaces: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Edit hidden states.

        Args:
            base: ``[B, ..., d]``, fp32, bf16, fp16 or fp64.
            source: Not used, as in the original.
            subspaces: For each of the B examples, the columns of R to use, or with
                ``subspace_partition`` the parts. None for all.

        Returns:
            The edited hidden states, with the shape and dtype of ``base``.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape, device or values.
        """
        self._check_base(base, next(self.parameters()).device)
        coeff = self._coeff(base, subspaces)
        activation = "linear"
        if self.activates:
            if type(self.act_fn) is not self._act_fn_type:
                raise ValueError(
                    f"act_fn: got {type(self.act_fn).__name__} since construction, expected "
                    f"{self._act_fn_type.__name__}; "
                    "pass act_fn to the constructor"
                )
            activation = self._activation
        output = self._edit(base, self.edit_weights(), activation, coeff)
        return self.dropout(output) if self.drops else output

    def _settings(self) -> dict:
        settings: dict[str, Any] = {"dropout": self.dropout.p} if self.drops else {}
        return settings | ({"act_fn": self._act_fn_name} if self.activates else {})

    def _adopt_settings(self, saved: dict) -> Callable[[], None]:
        act_fn, dropout = saved.get("act_fn"), saved.get("dropout")
        if (
            self.activates
            and act_fn is not None
            and "act_fn" in self._given
            and _activation(act_fn) != self._activation
        ):
            raise ValueError(
                f"state_dict: saved with act_fn {act_fn!r}, but the constructor was given "
                f"{self._act_fn_name!r}"
            )

        def adopt() -> None:
            if self.activates and act_fn is not None and "act_fn" not in self._given:
                self._set_act_fn(act_fn)
            if self.drops and dropout is not None and "dropout" not in self._given:
                self.dropout.p = dropout

        return adopt


class _Rotated(ReftIntervention):
    """Base of the interventions with orthonormal R and a linear learned source."""

    def _make_layers(self, kwargs: dict) -> None:
        self.rotate_layer = self._rotate_layer(kwargs)
        self.learned_source = self._linear()


class LoreftIntervention(_Rotated):
    """LoReFT: h + R^T (act(W h + b) - R h).

    R^T is ``rotate_layer.weight``; W and b are those of ``learned_source``.

    Source: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", equation 2.
    """

    def edit_weights(self) -> EditWeights:
        source = self.learned_source
        if self._activation == "linear":  # D = W - R needs one projection instead of two
            R, D = self.rotate_layer.build(source.weight)
            return EditWeights(D, source.bias, R, None, False)
        return EditWeights(source.weight, source.bias, self.rotate_layer.build()[0], None, True)

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Return a state dict in the format of the original class.

        It holds ``weight [r, d]`` and ``bias [r]`` of ``learned_source``, and ``rotate_layer
        [d, r]`` in fp32.
        """
        state: Any = OrderedDict() if destination is None else destination
        if not hasattr(state, "_metadata"):
            state._metadata = OrderedDict()
        state._metadata[prefix[:-1]] = {"version": self._version, SETTINGS: self._settings()}
        for name, parameter in self.learned_source.named_parameters():
            state[prefix + name] = parameter if keep_vars else parameter.detach()
        with torch.no_grad():
            state[prefix + "rotate_layer"] = self.rotate_layer.weight
        return state

    def _renamed(self, state: dict, prefix: str) -> None:
        layers = {
            "weight": "learned_source.weight",
            "bias": "learned_source.bias",
            "rotate_layer": "rotate_layer.weight",
        }
        for short, name in layers.items():
            if prefix + short in state:
                state[prefix + name] = state.pop(prefix + short)
        for name, buffer in self.named_buffers(recurse=False):  # not in the original's state dict
            state.setdefault(prefix + name, buffer)


class DireftIntervention(_Rotated):
    """DiReFT with orthonormal R: h + R^T act(W h + b).

    R^T is ``rotate_layer.weight``; W and b are those of ``learned_source``.
    """

    def edit_weights(self) -> EditWeights:
        source = self.learned_source
        return EditWeights(source.weight, source.bias, self.rotate_layer.build()[0], None, False)


class _ConstantSource(ReftIntervention):
    """Base of the interventions with a constant source."""

    activates = False

    def _make_layers(self, kwargs: dict) -> None:
        self.rotate_layer = self._rotate_layer(kwargs)
        self.learned_source = nn.Parameter(torch.rand(self._rank))


class ConsreftIntervention(_ConstantSource):
    """ConsReFT: h + R^T (s - R h), where s ``[r]`` is ``learned_source``.

    Like the original, it has neither dropout nor act_fn.
    """

    drops = False

    def edit_weights(self) -> EditWeights:
        return EditWeights(None, self.learned_source, self.rotate_layer.build()[0], None, True)


class LobireftIntervention(_ConstantSource):
    """LobiReFT: h + R^T s, where s ``[r]`` is ``learned_source``.

    Like the original, it has no act_fn.
    """

    def edit_weights(self) -> EditWeights:
        return EditWeights(None, self.learned_source, self.rotate_layer.build()[0], None, False)


class _Unconstrained(ReftIntervention):
    """Base of the interventions with unconstrained ``proj_layer`` and ``learned_source``.

    Args:
        add_bias: Whether ``proj_layer`` has a bias. The originals require this argument. Here the
            default is False, and loading a checkpoint with a bias adds it.
        **kwargs: See :class:`ReftIntervention`.
    """

    def _make_layers(self, kwargs: dict) -> None:
        self.proj_layer = self._linear(bias=bool(kwargs.get("add_bias")))
        self.learned_source = self._linear()

    def _check_state(self, state: dict, prefix: str) -> None:
        super()._check_state(state, prefix)
        bias = state.get(prefix + "proj_layer.bias")
        present: Tensor | None = self.proj_layer.bias
        if bias is None or present is not None or "add_bias" in self._given:
            return
        if tuple(bias.shape) != (self._rank,):
            raise ValueError(
                f"state_dict: {prefix}proj_layer.bias has shape {tuple(bias.shape)}, expected "
                f"({self._rank},)"
            )
        self.proj_layer.bias = nn.Parameter(torch.zeros_like(self.proj_layer.weight[:, 0]))


class NodireftIntervention(_Unconstrained):
    """NodiReFT, the paper's DiReFT: h + W2^T act(W1 h + b).

    W2 is ``proj_layer.weight``; W1 and b are those of ``learned_source``. As in the original, the
    bias of ``proj_layer`` is not used.
    """

    def edit_weights(self) -> EditWeights:
        return EditWeights(
            self.learned_source.weight,
            self.learned_source.bias,
            self.proj_layer.weight,
            None,
            False,
        )


class NoreftIntervention(_Unconstrained):
    """NoReFT: h + W2^T (act(W1 h + b) - (W2 h + b2)).

    W2 and b2 (only with add_bias) are those of ``proj_layer``; W1 and b are those of
    ``learned_source``.
    """

    def edit_weights(self) -> EditWeights:
        source, proj = self.learned_source, self.proj_layer
        return EditWeights(source.weight, source.bias, proj.weight, proj.bias, True)


class LowRankRotatedSpaceIntervention(
    FusedIntervention, TrainableIntervention, DistributedRepresentationIntervention
):
    """pyvene's low-rank DAS: h + R^T (R s - R h).

    s are the hidden states of the source run; R^T is ``rotate_layer.weight``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._begin(kwargs)
        self.rotate_layer = self._rotate_layer(kwargs)

    def forward(
        self,
        base: Tensor,
        source: Tensor,
        subspaces: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Edit hidden states.

        Args:
            base: ``[B, ..., d]``, fp32, bf16, fp16 or fp64.
            source: Hidden states of the source run, with a shape that broadcasts to that of
                ``base``. Differentiable.
            subspaces: For each example, the columns of R to exchange, or with
                ``subspace_partition`` the parts. None for all.
            **kwargs: Ignored.

        Returns:
            The edited hidden states, with the shape and dtype of ``base``.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape, device or values.
        """
        self._check_base(base, self.rotate_layer.X.device)
        if not isinstance(source, Tensor) or source.device != base.device:
            raise TypeError(
                f"source: got {describe(source)}, expected a tensor on {base.device}: this edit "
                "needs a source run"
            )
        try:
            source = source.expand(base.shape)
        except RuntimeError:
            raise ValueError(
                f"source: got shape {tuple(source.shape)}, expected {tuple(base.shape)}, as base"
            ) from None
        factors = self._coeff(base, subspaces)
        R = self.rotate_layer.build()[0]
        with torch.autocast(base.device.type, enabled=False):  # R stays in fp32
            exchanged = ((source.to(R.dtype) - base.to(R.dtype)) @ R.mT).reshape(-1, self._rank)
        coeff = exchanged if factors is None else exchanged * factors
        return self._edit(
            base, EditWeights(None, R.new_ones(self._rank), R, None, False), "linear", coeff
        )
