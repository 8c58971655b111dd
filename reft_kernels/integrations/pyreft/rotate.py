"""Replacement for pyreft's ``rotate_layer``, whose ``weight [d, r]`` has orthonormal columns.

pyreft uses ``torch.nn.utils.parametrizations.orthogonal``: weight = base @ H(original), with a
dense d x d base. Here the base is a product of r reflectors. The weight is the same function of the
unconstrained parameter, without a d x d matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.integrations.torch_orthogonal_state import BASE, ORIGINAL, evaluate, state
from reft_kernels.orthonormal import BasePoint
from reft_kernels.parametrization import _checked_orthonormal, base_point, build, orthonormalize


def weight_of_parametrization(original: Tensor, base: Tensor, where: str) -> Tensor:
    """Return the weight ``[d, r]`` of PyTorch's parametrization, on the CPU.

    Args:
        original: ``[d, r]``.
        base: ``[d, d]``.
        where: Prefix of error messages.
    """
    return evaluate(original.cpu(), base.cpu(), where)


def parametrization_of_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return original ``[d, r]`` and base ``[d, d]`` that give exactly ``weight [d, r]``.

    The base is H0 of :class:`RotateLayer`. An original layer that loads this state therefore
    changes in the same way under the same updates of its parameter.
    """
    original, base = state(weight.cpu())
    return original.to(weight.device), base.to(weight.device)


class RotateLayer(nn.Module):
    """Multiplies by ``weight [d, r]``, which has orthonormal columns for any X ``[d, r]``.

    weight = R^T = R0^T + H0 (F(X) - F(0)) F(0)[:r] diag(signs), the Householder map around the base
    point R0 (see :mod:`reft_kernels.orthonormal`). X is initialized to zero, so a weight that is
    set is kept bit for bit, and weight decay moves R towards R0. X and R remain in fp32 when the
    module is cast to half precision. The state dict has the form of PyTorch's parametrization, so
    that pyreft and pyvene can load it. It does not contain X, which is zero after loading.

    Args:
        n: d.
        m: r, from 1 to min(d, 256).
        same_random_draws: Also draw the random numbers with which the original completes its base.
    """

    base_R: Tensor
    base_reflectors: Tensor
    base_signs: Tensor

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
        """Set the weight, bit for bit in fp32.

        Args:
            weight: ``[d, r]`` with orthonormal columns.
            name: Name for error messages.

        Raises:
            ValueError: If the shape is wrong or the columns are not orthonormal.
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
        """Compute R and optionally D = W - R in one call.

        If no gradient is needed, the result is cached until X, W or the base changes.

        Args:
            W: ``[r, d]`` or None.

        Returns:
            R ``[r, d]`` in fp32, and D ``[r, d]`` or None.
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
            # Not inference tensors, because a later backward pass may save them
            with torch.inference_mode(False), torch.no_grad():
                self._built = (key, self._build(W))
        return self._built[1]

    @property
    def weight(self) -> Tensor:
        """R^T ``[d, r]`` in fp32, differentiable with respect to X.

        This is a new tensor, which may be changed.
        """
        return self.build()[0].mT.clone(memory_format=torch.contiguous_format)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.set_weight(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return x weight ``[..., r]`` in the dtype of R, for x ``[..., d]``."""
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
        entries = {key: state_dict[key] for key in state_dict if key.startswith(prefix)}
        parts = entries.pop(prefix + ORIGINAL, None), entries.pop(prefix + BASE, None)
        weight = entries.pop(prefix + "weight", None)
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
            unexpected_keys.extend(entries)

    def extra_repr(self) -> str:
        return f"{self.X.shape[0]}, {self.X.shape[1]}"
