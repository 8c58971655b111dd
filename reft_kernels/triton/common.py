"""Shared parts of the Triton kernels: activations, matrix products and launch options."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from reft_kernels.allocation import contiguous as contiguous
from reft_kernels.dispatch import interpreting

INTERPRETING = interpreting()
IS_AMD = torch.version.hip is not None
MIN_DOT = 16  # smallest tile side that tl.dot supports on every target


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n; 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up. ``triton.cdiv`` takes about 2 us when called from the host."""
    return -(-a // b)


CUDA_OPTIONS = {"maxnreg": 255}  # otherwise ptxas spills registers to increase occupancy


def compile_options(device_type: str) -> dict[str, int]:
    """Return additional compiler options for launches on a type of device."""
    return CUDA_OPTIONS if device_type == "cuda" and not IS_AMD else {}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can use."""
    if device.type != "cuda" or IS_AMD:  # PyTorch does not report it for AMD GPUs
        return 64 * 1024 if IS_AMD else 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def dot_precision(dtype: torch.dtype) -> str | None:
    """Return the ``input_precision`` of products with hidden states of a dtype.

    None means that the operands stay in ``dtype`` (bf16 or fp16). On NVIDIA GPUs, fp32 operands use
    three tf32 products, which keep about 22 bits of the mantissa; plain fp32 products would not use
    tensor cores and cause register spills. AMD GPUs have fp32 matrix cores. The interpreter
    computes bf16 products incorrectly, so bf16 operands are converted to fp32 there.
    """
    if INTERPRETING:
        return None if dtype == torch.float16 else "ieee"
    if dtype != torch.float32:
        return None
    return "ieee" if IS_AMD else "tf32x3"


def small_precision(dtype: torch.dtype) -> str | None:
    """Return the ``input_precision`` of products with inner dimension r (:func:`dot_small`).

    As :func:`dot_precision`, but both operands are fp32. "bf16" means that they are rounded to
    bf16, as in a computation in bf16, and None that they are split into bf16 terms.
    """
    if INTERPRETING:
        return "ieee"
    return "bf16" if dtype == torch.bfloat16 else dot_precision(dtype)


@triton.jit
def tanh(z):
    """Return tanh(z) accurate to fp32 rounding.

    Uses a series for small |z|, where 1 - exp(-2 |z|) would suffer from cancellation.
    """
    a = tl.abs(z)
    t = tl.exp(-2.0 * a)
    far = (1.0 - t) / (1.0 + t)
    s = z * z
    near = a * (
        1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
    )
    size = tl.where(a < 0.25, near, far)
    return tl.where(z < 0, -size, size)


@triton.jit
def sigmoid(z):
    """Return 1 / (1 + exp(-z)), computed from exp(-|z|) to avoid overflow."""
    t = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0 / (1.0 + t), t / (1.0 + t))


@triton.jit
def sigmoid_derivative(z):
    """Return sigmoid(z) (1 - sigmoid(z)) from exp(-|z|), without cancellation where z is large."""
    t = tl.exp(-tl.abs(z))
    return t / ((1.0 + t) * (1.0 + t))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return act(z) in fp32."""
    if ACTIVATION == "relu":
        # A comparison instead of maximum, so that NaN is propagated
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(x)) = sigmoid(2 x)
        return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    elif ACTIVATION == "tanh":
        return tanh(z)
    elif ACTIVATION == "sigmoid":
        return sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "linear")
        return z


@triton.jit
def activation_derivative(z, ACTIVATION: tl.constexpr):
    """Return act'(z) in fp32; relu'(0) is 0."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return (
            0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        )
    elif ACTIVATION == "gelu_tanh":
        x = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        return sigmoid(x) + z * sigmoid_derivative(x) * 1.5957691216057308 * (
            1.0 + 0.134145 * z * z
        )
    elif ACTIVATION == "silu":
        return sigmoid(z) + z * sigmoid_derivative(z)
    elif ACTIVATION == "tanh":
        return 4.0 * sigmoid_derivative(2.0 * z)
    elif ACTIVATION == "sigmoid":
        return sigmoid_derivative(z)
    else:
        tl.static_assert(ACTIVATION == "linear")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def truncated_terms(v):
    """Return bf16 terms (high, low) of fp32 v, both truncated, which needs no conversions."""
    bits = v.to(tl.uint32, bitcast=True)
    high = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    low_bits = (v - high).to(tl.uint32, bitcast=True)
    return (
        (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True),
        (low_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True),
    )


@triton.jit
def add_product(acc, x, w, PRECISION: tl.constexpr):
    """Return acc + x w for hidden states x and weights w in any dtype.

    Without PRECISION, w is split into a high and a low term of the dtype of x, so that tensor cores
    can be used and about 16 bits of w are kept; w of that dtype is exact in one term.
    """
    if PRECISION is not None:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision=PRECISION)
    elif w.dtype == x.dtype:
        return tl.dot(x, w, acc)
    elif x.dtype == tl.bfloat16:
        high, low = truncated_terms(w.to(tl.float32))
        return tl.dot(x, low, tl.dot(x, high, acc))
    else:
        w = w.to(tl.float32)
        high = w.to(x.dtype)
        low = (w - high.to(tl.float32)).to(x.dtype)
        return tl.dot(x, low, tl.dot(x, high, acc))


@triton.jit
def dot_small(v, w, PRECISION: tl.constexpr):
    """Return v w for fp32 v and w with inner dimension r.

    With PRECISION "bf16", both are rounded to bf16. Without PRECISION, both are split into high and
    low bf16 terms, and three of their products are added; this is used for fp16 hidden states,
    because bf16 has the range of fp32.
    """
    if PRECISION == "bf16":
        return tl.dot(v.to(tl.bfloat16), w.to(tl.bfloat16))
    elif PRECISION is not None:
        return tl.dot(v, w.to(tl.float32), input_precision=PRECISION)
    else:
        w = w.to(tl.float32)
        v_high = v.to(tl.bfloat16)
        v_low = (v - v_high.to(tl.float32)).to(tl.bfloat16)
        w_high = w.to(tl.bfloat16)
        w_low = (w - w_high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(v_high, w_high) + (tl.dot(v_low, w_high) + tl.dot(v_high, w_low))
