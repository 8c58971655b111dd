"""Names, values and derivatives of the activation functions of an edit."""

from __future__ import annotations

import math

import torch

ACTIVATIONS = ("linear", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
"""Activations implemented by every backend.

``gelu`` is the exact (erf) form and ``gelu_tanh`` is the tanh approximation.
"""

_ALIASES = {
    "identity": "linear",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
}
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def canonical_activation(name: str | None) -> str:
    """Return the canonical name of an activation.

    Args:
        name: A name from :data:`ACTIVATIONS`, a Hugging Face ``ACT2FN`` alias, or None for linear.
            Case is ignored.

    Returns:
        A name from :data:`ACTIVATIONS`.

    Raises:
        ValueError: If ``name`` is not a known activation.
    """
    if name is None:
        return "linear"
    key = name.lower() if isinstance(name, str) else name
    key = _ALIASES.get(key, key)
    if key not in ACTIVATIONS:
        raise ValueError(f"activation: got {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return key


def activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act(z), computed elementwise in the dtype of ``z``."""
    if activation == "linear":
        return z
    if activation == "relu":
        return torch.relu(z)
    if activation == "gelu":
        return torch.nn.functional.gelu(z)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(z, approximate="tanh")
    if activation == "silu":
        return torch.nn.functional.silu(z)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


def activation_derivative(z: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act'(z), computed elementwise in the dtype of ``z``; relu'(0) is 0, as in PyTorch."""
    if activation == "linear":
        return torch.ones_like(z)
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))
        return cdf + z * torch.exp(-0.5 * z * z) * (1.0 / math.sqrt(2.0 * math.pi))
    if activation == "gelu_tanh":
        t = torch.tanh(_SQRT_2_OVER_PI * (z + _GELU_CUBIC * z**3))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * _SQRT_2_OVER_PI * (
            1.0 + 3.0 * _GELU_CUBIC * z * z
        )
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    if activation == "tanh":
        t = torch.tanh(z)
        return 1.0 - t * t
    if activation == "sigmoid":
        s = torch.sigmoid(z)
        return s * (1.0 - s)
    raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
