"""pyreft's and pyvene's trainable interventions by name, keyword, attribute and state dict, on the
fused operators.

Each forward is one edit operator (and, where R is orthonormal, one build of R). What differs from
the originals on purpose:

    subspaces   columns of R for each example, as in pyreft's notebooks (the shipped classes ignore
                it), and ``subspace_coeff``
    dropout     follows ``reft_model.train()`` and ``.eval()``; the originals' stays on, since
                pyvene passes neither on
    R           orthonormal under any weight decay, exact after load, no d x d base in memory
    checkpoint  keeps ``dropout`` and ``act_fn`` (in the state dict's metadata) and the dtype,
                unless the constructor named them
    base        may have another dtype than ``learned_source``; products are summed in fp32

Sources: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models"; Wu et al. 2024,
"pyvene: A Library for Understanding and Improving PyTorch Models via Interventions"; Geiger et al.
2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
Representations" (DAS).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

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
    """What pyreft's classes share: no source run, dropout on h + delta, an activation of the read.

    Further keywords: dropout, a probability; act_fn, an ``ACT2FN`` name that the engine has; dtype
    of the linear layers, by default bf16 (as the originals).
    """

    drops = True  # the original has dropout
    activates = True  # the original has act_fn

    def __init__(self, **kwargs) -> None:
        super().__init__(**{"keep_last_dim": True, **kwargs})
        self._begin(kwargs)
        self._make_layers(kwargs)
        if self.drops:
            self.dropout = nn.Dropout(0.0 if kwargs.get("dropout") is None else kwargs["dropout"])
        if self.activates:
            self._set_act_fn(kwargs.get("act_fn"))

    def _make_layers(self, kwargs: dict) -> None:
        raise NotImplementedError

    def _set_act_fn(self, name: str | None) -> None:
        self._activation = _activation(name)
        self._act_fn_name = name or "linear"
        self.act_fn = ACT2FN[self._act_fn_name]
        self._act_fn_type = type(self.act_fn)

    def edit_weights(self) -> EditWeights:
        """The weights of the general edit (:class:`EditWeights`), with R built now."""
        raise NotImplementedError

    def forward(
        self, base: Tensor, source: None = None, subspaces: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """The edited ``base [B, ..., d]`` in its dtype, by the class's formula.

        Args:
            base: fp32, bf16, fp16 (or fp64). source: not used, as in the original. subspaces: for
            each of the B examples the columns of R (parts, with ``subspace_partition``) that it
            uses; None: all.

        Raises:
            TypeError, ValueError: an argument of another kind, shape, dtype or device.
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
        found = {"dropout": self.dropout.p} if self.drops else {}
        return found | ({"act_fn": self._act_fn_name} if self.activates else {})

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
    def _make_layers(self, kwargs: dict) -> None:
        self.rotate_layer = self._rotate_layer(kwargs)
        self.learned_source = self._linear()


class LoreftIntervention(_Rotated):
    """LoReFT: h + R^T (act(W h + b) - R h); R^T = ``rotate_layer.weight``; W, b =
    ``learned_source`` (ReFT, equation 2).
    """

    def edit_weights(self) -> EditWeights:
        source = self.learned_source
        if self._activation == "linear":  # folded: D = W - R, one projection instead of two
            R, D = self.rotate_layer.build(source.weight)
            return EditWeights(D, source.bias, R, None, False)
        return EditWeights(source.weight, source.bias, self.rotate_layer.build()[0], None, True)

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False):
        """The original's entries: ``weight`` [r, d] and ``bias`` [r] of ``learned_source``,
        ``rotate_layer`` [d, r] in fp32.
        """
        found = OrderedDict() if destination is None else destination
        if not hasattr(found, "_metadata"):
            found._metadata = OrderedDict()
        found._metadata[prefix[:-1]] = {"version": self._version, SETTINGS: self._settings()}
        for name, parameter in self.learned_source.named_parameters():
            found[prefix + name] = parameter if keep_vars else parameter.detach()
        with torch.no_grad():
            found[prefix + "rotate_layer"] = self.rotate_layer.weight
        return found

    def _renamed(self, state: dict, prefix: str) -> None:
        layers = {
            "weight": "learned_source.weight",
            "bias": "learned_source.bias",
            "rotate_layer": "rotate_layer.weight",
        }
        for short, name in layers.items():
            if prefix + short in state:
                state[prefix + name] = state.pop(prefix + short)
        for name, buffer in self.named_buffers(recurse=False):  # the original leaves them out
            state.setdefault(prefix + name, buffer)


class DireftIntervention(_Rotated):
    """DiReFT, the ablation of LoReFT: h + R^T act(W h + b); R^T = ``rotate_layer.weight``, W, b
    = ``learned_source``.
    """

    def edit_weights(self) -> EditWeights:
        source = self.learned_source
        return EditWeights(source.weight, source.bias, self.rotate_layer.build()[0], None, False)


class _ConstantSource(ReftIntervention):
    activates = False

    def _make_layers(self, kwargs: dict) -> None:
        self.rotate_layer = self._rotate_layer(kwargs)
        self.learned_source = nn.Parameter(torch.rand(self._rank))


class ConsreftIntervention(_ConstantSource):
    """ConsReFT: h + R^T (s - R h), s [r] = ``learned_source``; without dropout or act_fn, as the
    original.
    """

    drops = False

    def edit_weights(self) -> EditWeights:
        return EditWeights(None, self.learned_source, self.rotate_layer.build()[0], None, True)


class LobireftIntervention(_ConstantSource):
    """LobiReFT: h + R^T s, s [r] = ``learned_source``; without act_fn, as the original."""

    def edit_weights(self) -> EditWeights:
        return EditWeights(None, self.learned_source, self.rotate_layer.build()[0], None, False)


class _Unconstrained(ReftIntervention):
    """``proj_layer`` and ``learned_source``, both free.

    add_bias gives ``proj_layer`` a bias. The originals require the keyword; here it is False when
    it is not given, and then a checkpoint with the bias brings it.
    """

    def _make_layers(self, kwargs: dict) -> None:
        self.proj_layer = self._linear(bias=bool(kwargs.get("add_bias")))
        self.learned_source = self._linear()

    def _check_state(self, state: dict, prefix: str) -> None:
        super()._check_state(state, prefix)
        bias = state.get(prefix + "proj_layer.bias")
        if bias is None or self.proj_layer.bias is not None or "add_bias" in self._given:
            return
        if tuple(bias.shape) != (self._rank,):
            raise ValueError(
                f"state_dict: {prefix}proj_layer.bias has shape {tuple(bias.shape)}, expected "
                f"({self._rank},)"
            )
        self.proj_layer.bias = nn.Parameter(torch.zeros_like(self.proj_layer.weight[:, 0]))


class NodireftIntervention(_Unconstrained):
    """NodiReFT (the paper's "DiReFT"): h + W2^T act(W1 h + b); W2 = ``proj_layer.weight``; W1, b =
    ``learned_source``.

    A bias of ``proj_layer`` (add_bias) is not used, as in the original.
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
    """NoReFT: h + W2^T (act(W1 h + b) - (W2 h + b2)); W2, b2 (with add_bias) = ``proj_layer``;
    W1, b = ``learned_source``.
    """

    def edit_weights(self) -> EditWeights:
        source, proj = self.learned_source, self.proj_layer
        return EditWeights(source.weight, source.bias, proj.weight, proj.bias, True)


class LowRankRotatedSpaceIntervention(
    FusedIntervention, TrainableIntervention, DistributedRepresentationIntervention
):
    """pyvene's low-rank DAS: h + R^T (R s - R h), s the source run's hidden state; R^T =
    ``rotate_layer.weight``.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._begin(kwargs)
        self.rotate_layer = self._rotate_layer(kwargs)

    def forward(
        self,
        base: Tensor,
        source: Tensor,
        subspaces: Sequence[Sequence[int]] | None = None,
        **kwargs,
    ) -> Tensor:
        """The edited ``base [B, ..., d]`` in its dtype.

        Args:
            base: fp32, bf16, fp16 (or fp64). source: of base's shape, or one that broadcasts to it;
                differentiable.
            subspaces: for each example the columns of R (parts, with a ``subspace_partition``) that
                are exchanged; None: all.

        Raises:
            TypeError, ValueError: an argument of another kind, shape, dtype or device.
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
        chosen = self._coeff(base, subspaces)
        R = self.rotate_layer.build()[0]
        with torch.autocast(base.device.type, enabled=False):  # R stays in fp32
            exchanged = ((source.to(R.dtype) - base.to(R.dtype)) @ R.mT).reshape(-1, self._rank)
        coeff = exchanged if chosen is None else exchanged * chosen
        return self._edit(
            base, EditWeights(None, R.new_ones(self._rank), R, None, False), "linear", coeff
        )
