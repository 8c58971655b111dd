"""What the Triton kernels share: activations, exact low-precision products, launch conditions."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels.allocation import contiguous  # noqa: F401  (the kernels' launches take it from here)
from reft_kernels.dispatch import interpreting

INTERPRETING = interpreting()
IS_AMD = torch.version.hip is not None
MIN_DOT = 16  # smallest tile side that tl.dot takes on every target


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n = 0)."""
    return 1 << max(n - 1, 0).bit_length()


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's device: with a model spread over GPUs the current device is often
    another one.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


CUDA_OPTIONS = {"maxnreg": 255}  # else ptxas spills to reach an occupancy that it was not asked for


def compile_options(tensor: Tensor) -> dict[str, int]:
    """What the launches on ``tensor``'s device give the compiler beside warps and stages."""
    return CUDA_OPTIONS if tensor.is_cuda and not IS_AMD else {}


def dot_precision(dtype: torch.dtype) -> str | None:
    """``input_precision`` of products whose operands are fp32; None where they stay in the
    half-precision ``dtype``.

    NVIDIA: three tf32 products, which keep about 22 bits of mantissa, since fp32 ones run outside
    the tensor cores and spill. AMD has fp32 matrix cores. The interpreter's bf16 dot is wrong, so
    bf16 is fp32 there.
    """
    if INTERPRETING:
        return None if dtype == torch.float16 else "ieee"
    if dtype != torch.float32:
        return None
    return "ieee" if IS_AMD else "tf32x3"


def small_precision(dtype: torch.dtype) -> str | None:
    """As :func:`dot_precision`, for products of two fp32 operands, which are split into bf16
    terms for half ``dtype``.
    """
    return "ieee" if INTERPRETING else dot_precision(dtype)


@triton.jit
def tanh(z):
    """tanh to fp32 rounding: a series near 0, where 1 - exp(-2|z|) would cancel."""
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
    """1 / (1 + exp(-z)) without overflow: exp only of -|z|."""
    t = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0 / (1.0 + t), t / (1.0 + t))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) in fp32."""
    if ACTIVATION == "relu":
        # the comparison, not maximum: NaN must pass through
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * z * (1.0 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
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
    """act'(z) in fp32; relu'(0) = 0."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return (
            0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        )
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.7978845608028654 * (
            1.0 + 0.134145 * z * z
        )
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = tanh(z)
        return 1.0 - t * t
    elif ACTIVATION == "sigmoid":
        s = sigmoid(z)
        return s * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == "linear")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def dot_exact_left(x, w, PRECISION: tl.constexpr):
    """x w, [N, D] x [D, R] with x in the hidden state's dtype and w fp32, to about 16 bits of w.

    A half-precision x keeps the tensor cores: w is split into two terms of x's dtype, high and low.
    """
    if PRECISION is not None:
        return tl.dot(x.to(tl.float32), w, input_precision=PRECISION)
    else:
        high = w.to(x.dtype)
        low = (w - high.to(tl.float32)).to(x.dtype)
        return tl.dot(x, high) + tl.dot(x, low)


@triton.jit
def dot_exact_right(v, x, PRECISION: tl.constexpr):
    """v x with v fp32 and x in the hidden state's dtype; v is scaled to [-1, 1] first where its
    range could leave fp16's.
    """
    if PRECISION is not None:
        return tl.dot(v, x.to(tl.float32), input_precision=PRECISION)
    elif x.dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(v), 1), 0)
        scale = tl.where(largest > 0, largest, 1.0)
        v = v / scale
        high = v.to(tl.float16)
        low = (v - high.to(tl.float32)).to(tl.float16)
        return (tl.dot(high, x) + tl.dot(low, x)) * scale
    else:
        high = v.to(x.dtype)
        low = (v - high.to(tl.float32)).to(x.dtype)
        return tl.dot(high, x) + tl.dot(low, x)


@triton.jit
def dot_small(v, w, PRECISION: tl.constexpr):
    """v w with both fp32 and the inner side r: three tensor-core products of high and low bf16
    terms, or one in fp32.

    bf16 terms serve fp16 hidden states too, for they keep fp32's range.
    """
    if PRECISION is not None:
        return tl.dot(v, w, input_precision=PRECISION)
    else:
        v_high = v.to(tl.bfloat16)
        v_low = (v - v_high.to(tl.float32)).to(tl.bfloat16)
        w_high = w.to(tl.bfloat16)
        w_low = (w - w_high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(v_high, w_high) + (tl.dot(v_low, w_high) + tl.dot(v_high, w_low))


@triton.jit
def effective_weight(read, write, offsets, mask, FOLD: tl.constexpr):
    """The weight of the one product that z needs: A, with FOLD A - B, and without a read matrix
    -B; fp32.
    """
    if read is not None:
        a = tl.load(read + offsets, mask=mask, other=0.0).to(tl.float32)
        if FOLD:
            a -= tl.load(write + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        a = -tl.load(write + offsets, mask=mask, other=0.0).to(tl.float32)
    return a


@triton.jit
def product_step(acc, x, w, USE_DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x w^T over one block of columns: [N, R] on the tensor cores, or elementwise into [N,
    R, D], reduced at the end.
    """
    if USE_DOT:
        return acc + dot_exact_left(x, tl.trans(w), PRECISION)
    else:
        return acc + x.to(tl.float32)[:, None, :] * w[None, :, :]


@triton.jit
def product_start(
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, USE_DOT: tl.constexpr
):
    """The zero that :func:`product_step` adds to."""
    if USE_DOT:
        return tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    else:
        return tl.zeros((BLOCK_N, BLOCK_R, BLOCK_D), tl.float32)


@triton.jit
def product_end(acc, USE_DOT: tl.constexpr):
    """[N, R] from what :func:`product_step` accumulated."""
    if USE_DOT:
        return acc
    else:
        return tl.sum(acc, 2)


@triton.jit
def expand(v, w, USE_DOT: tl.constexpr, PRECISION: tl.constexpr):
    """v w, [N, R] x [R, D] -> [N, D], fp32."""
    if USE_DOT:
        return dot_small(v, w, PRECISION)
    else:
        return tl.sum(v[:, :, None] * w[None, :, :], 1)
