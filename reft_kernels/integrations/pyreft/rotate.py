"""R as pyreft's ``rotate_layer``: a module with a ``weight`` [d, r] of orthonormal columns, and its
checkpoint form.

pyreft parametrizes it by ``torch.nn.utils.parametrizations.orthogonal``: weight = base @
H(original) with a dense d x d base. Here the base is r reflectors, and the map the engine's: the
same curve through the same start, without the d x d matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reft_kernels.conversion.orthogonal_state import BASE, ORIGINAL, evaluate, state
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.orthonormal import BasePoint
from reft_kernels.parametrization import _checked_orthonormal, base_point, build, orthonormalize


def weight_of_parametrization(original: Tensor, base: Tensor, where: str) -> Tensor:
    """The weight ``[d, r]`` that torch's parametrization makes of original ``[d, r]`` and base
    ``[d, d]``; on the CPU.
    """
    return evaluate(original.cpu(), base.cpu(), where)


def parametrization_of_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """original ``[d, r]`` and base ``[d, d]`` that show exactly ``weight [d, r]``; base is H0 of
    :class:`RotateLayer`.

    So an original that loads them walks the same curve under the same updates of its free
    parameter.
    """
    original, base = state(weight.cpu())
    return original.to(weight.device), base.to(weight.device)


class RotateLayer(nn.Module):
    """x -> x weight, weight ``[d, r]`` = R^T with orthonormal columns whatever an optimizer does to
    its free X ``[d, r]``.

    weight = R0^T + H0 (F(X) - F(0)) F(0)[:r] diag(signs), the Householder map around the base point
    R0 (see :mod:`reft_kernels.orthonormal`); X starts at zero, so a weight that is set is kept bit
    for bit, and weight decay pulls R
    towards R0. X and R stay in fp32 when the module is cast to half precision. Not in the state
    dict: X; it holds what torch's own parametrization would, so that pyreft and pyvene can load it
    (X then starts anew from zero).

    Args:
        n: d. m: r, 1 to min(d, 256). same_random_draws: draw also what the original draws to
            complete its base.
    """

    def __init__(self, n: int, m: int, *, same_random_draws: bool = False) -> None:
        super().__init__()
        self._built: tuple | None = None
        self.X = nn.Parameter(torch.zeros(n, m, dtype=torch.float32))
        drawn = nn.init.orthogonal_(torch.empty(n, m, dtype=torch.float32, device="cpu"))
        if same_random_draws and n > m:
            torch.randn(n, n - m, dtype=torch.float32)
        for name, value in base_point(orthonormalize(drawn.mT))._asdict().items():
            self.register_buffer(f"base_{name}", value.to(self.X.device), persistent=False)

    @torch.no_grad()
    def set_weight(self, weight: Tensor, name: str = "weight") -> None:
        """Make ``weight [d, r]`` the current one, bit for bit in fp32.

        Raises:
            ValueError: another shape, or columns that are not orthonormal.
        """
        if weight.shape != self.X.shape:
            raise ValueError(
                f"{name}: got shape {tuple(weight.shape)}, expected {tuple(self.X.shape)}"
            )
        R = weight.detach().to(accumulation_dtype(self.X.dtype)).mT
        _checked_orthonormal(R, name)
        for part, value in base_point(R)._asdict().items():
            getattr(self, f"base_{part}").copy_(value)
        self.X.zero_()
        self._built = None

    def _build(self, W: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return build(
            "householder",
            self.X,
            W,
            base=BasePoint(self.base_R, self.base_reflectors, self.base_signs),
        )

    def build(self, W: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """R ``[r, d]`` in fp32 and, given W ``[r, d]``, D = W - R, in one launch; kept while no
        graph is needed.

        Without gradients they are built again only after X, W or the base changed.
        """
        graph = torch.is_grad_enabled() and (
            self.X.requires_grad or (W is not None and W.requires_grad)
        )
        if graph or torch.compiler.is_compiling():
            self._built = None
            return self._build(W)
        tensors = [t for t in (self.X, self.base_R, W) if t is not None]
        key = None
        if not any(t.is_inference() for t in tensors):
            key = tuple((t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)
        if self._built is None or key is None or self._built[0] != key:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # normal tensors: a later backward may save them
                self._built = (key, self._build(W))
        return self._built[1]

    @property
    def weight(self) -> Tensor:
        """R^T ``[d, r]`` in fp32, differentiable with respect to X; a tensor of its own, which
        may be changed.
        """
        return self.build()[0].mT.clone(memory_format=torch.contiguous_format)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.set_weight(value)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., d]`` -> ``[..., r]`` in R's dtype, as the original."""
        weight = self.build()[0].mT
        return x.to(weight.dtype) @ weight

    def train(self, mode: bool = True):
        self._built = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._built = None

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            halved = moved.dtype in (torch.bfloat16, torch.float16) and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if halved else moved

        return super()._apply(keep_precision, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_built": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        with torch.no_grad():
            destination[prefix + ORIGINAL], destination[prefix + BASE] = parametrization_of_weight(
                self.weight
            )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        own = {key: state_dict[key] for key in state_dict if key.startswith(prefix)}
        parts = own.pop(prefix + ORIGINAL, None), own.pop(prefix + BASE, None)
        weight = own.pop(prefix + "weight", None)
        if weight is None and None not in parts:
            weight = weight_of_parametrization(*parts, prefix[:-1])
        if weight is not None:
            self.set_weight(weight, prefix + "weight")
        elif strict:
            missing_keys.extend(
                prefix + name
                for name, part in zip((ORIGINAL, BASE), parts, strict=True)
                if part is None
            )
        if strict:
            unexpected_keys.extend(own)

    def extra_repr(self) -> str:
        return f"{self.X.shape[0]}, {self.X.shape[1]}"
