"""LoReFT in straightforward PyTorch: what one writes from the paper, and what reft_kernels is
compared with.

    y = h + R^T (W h + b - R h)    h: selected rows [N, d]; R, W: [r, d]; b: [r]
                                   (arXiv:2404.03592, equation 2)

R is a linear layer's weight under ``torch.nn.utils.parametrizations.orthogonal``; forward hooks
gather the selected
rows, edit them and scatter them. It is kept fair: R is evaluated once for each edit (pyreft does it
three times), rows are found once for each batch, and there is no d x d base matrix
(``use_trivialization=False``). That last choice is
also the parametrization of reft_kernels, so the two trainings can be compared step by step. It
needs weight decay 0:
decay would shrink the signs that it keeps in X's diagonal, and their truncation to integers would
make R zero.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from reft_train.demo.encoder import layers_of
from reft_train.pooling import EncoderClassifier

_SPEC = re.compile(r"^(?:f([1-9]\d*))?(?:(?:^|\+)l([1-9]\d*))?$")


def select_rows(spec: str, attention_mask: Tensor) -> Tensor:
    """Rows of ``hidden.reshape(-1, d)`` that a spec selects among the real tokens, int64 ``[N]``.

    Args:
        spec: "all", "fN", "lM" or "fN+lM"; in the last, both counts are clamped to half the length,
            so that no row is
            selected twice. attention_mask: ``[B, T]``.
    """
    real = attention_mask.bool()
    if spec == "all":
        return real.flatten().nonzero().squeeze(1)
    match = _SPEC.match(spec)
    if not spec or match is None:
        raise ValueError(f"spec: got {spec!r}, expected 'all', 'fN', 'lM' or 'fN+lM'")
    first, last = (int(count or 0) for count in match.groups())
    length = real.sum(1, keepdim=True)
    limit = length // 2 if first and last else length
    number = real.cumsum(1) - 1  # a token's place among the real ones
    chosen = (number < limit.clamp(max=first)) | (number >= length - limit.clamp(max=last))
    return (chosen & real).flatten().nonzero().squeeze(1)


class TorchLoReFT(nn.Module):
    """One layer's edit, starting as the identity: W = R, b = 0.

    Args:
        rotation: R at the start, ``[r, d]`` with orthonormal rows. use_trivialization: PyTorch's
            default, with its d x d base.
    """

    def __init__(self, rotation: Tensor, *, use_trivialization: bool = False) -> None:
        super().__init__()
        rank, width = rotation.shape
        linear = nn.Linear(width, rank, bias=False)
        self.rotate = orthogonal(
            linear, orthogonal_map="householder", use_trivialization=use_trivialization
        )
        self.source = nn.Linear(width, rank)
        with torch.no_grad():
            self.rotate.weight = rotation
            self.source.weight.copy_(
                self.rotate.weight
            )  # not rotation: the round trip through X costs an ulp
            self.source.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Edited rows ``[N, d]``."""
        R = self.rotate.weight
        return hidden + (self.source(hidden) - hidden @ R.T) @ R


class HookedLoReFT(nn.Module):
    """An :class:`EncoderClassifier` whose chosen layers' outputs are edited by forward hooks.

    Args:
        model: the classifier; its head is trained besides. layers: numbers of the layers to edit.
        rotations: R of each of them at the start, ``[L, r, d]``. positions: see
        :func:`select_rows`.
    """

    def __init__(
        self, model: EncoderClassifier, layers: list[int], rotations: Tensor, positions: str
    ) -> None:
        super().__init__()
        self.model = model
        self.positions = positions
        self.edits = nn.ModuleList(TorchLoReFT(rotation) for rotation in rotations)
        self._rows: Tensor | None = None
        blocks = layers_of(model.encoder)
        for layer, edit in zip(layers, self.edits, strict=True):
            blocks[layer].register_forward_hook(self._hook(edit))

    def _hook(self, edit: TorchLoReFT):
        def edit_output(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            hidden = output[0] if isinstance(output, tuple) else output
            flat = hidden.reshape(-1, hidden.shape[-1])
            edited = flat.index_copy(0, self._rows, edit(flat.index_select(0, self._rows))).view_as(
                hidden
            )
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit_output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, as the wrapped model's."""
        self._rows = select_rows(self.positions, attention_mask)
        return self.model(input_ids=input_ids, attention_mask=attention_mask)
