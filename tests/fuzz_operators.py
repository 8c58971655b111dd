"""Fuzzer that calls the operators with mutated arguments.

    python -m tests.fuzz_operators --backend cpu --first 0 --cases 5000

A case is a valid call of one operator with up to two mutations, determined by a seed. The call must
do one of the following:

    raise   TypeError, ValueError or RuntimeError, with all arguments unchanged.
    return  The results agree with the same call in fp64 on the ``torch`` backend. Only the selected
            rows of the first argument of an in-place operator are changed.

Each seed is printed before its case runs. If the process crashes, the last line names the case.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import warnings

import torch
from torch import Tensor

import reft_kernels as rk
from reft_kernels import ops
from reft_kernels.activations import ACTIVATIONS
from reft_kernels.parametrization import base_point

ALLOWED = (TypeError, ValueError, RuntimeError)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
WRONG_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float64,
    torch.bfloat16,
    torch.float32,
    torch.float8_e4m3fn,
)


def argument_kinds(name: str) -> dict[str, str]:
    """Return the types of an operator's arguments by name, in the order of the schema."""
    return {
        a.name: str(a.type) for a in getattr(torch.ops.reft_kernels, name).default._schema.arguments
    }


def argument_names(name: str) -> list[str]:
    """Return the names of an operator's arguments, in order."""
    return list(argument_kinds(name))


class Draw:
    """Random valid arguments of an operator.

    Args:
        seed: Determines all arguments.
        dtypes: Possible dtypes of the hidden states, or of X for the orthonormal maps.
    """

    def __init__(self, seed: int, dtypes: tuple[torch.dtype, ...]):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(dtypes)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        wanted = self.random.choice((torch.float32, self.dtype)) if dtype is None else dtype
        return (torch.randn(shape, generator=self.generator) / 2).to(wanted)

    def selection(self, rows: int) -> tuple[Tensor | None, Tensor | None, int, int | None]:
        """Return ``rows``, ``weight_ids``, N (the number of entries) and S (the number of sets)."""
        chosen, count, sets = None, rows, None
        if self.chance(0.7):
            count = self.random.randint(0, rows)
            chosen = torch.randperm(rows, generator=self.generator)[:count].to(torch.int32)
            if count and self.chance(0.4):
                chosen[self.random.randrange(count)] = -1
        if self.chance(0.4):
            sets = self.random.randint(1, 3)
        ids = (
            None
            if sets is None
            else torch.randint(sets, (count,), generator=self.generator, dtype=torch.int32)
        )
        return chosen, ids, count, sets

    def forward_of_edit(self) -> dict:
        m, d, r = (
            self.random.randint(0, 7),
            self.random.randint(1, 20),
            self.random.choice((1, 2, 3, 5, 9)),
        )
        rows, weight_ids, count, sets = self.selection(m)
        lead = () if sets is None else (sets,)
        subtract_projection = self.chance(0.5)
        return {
            "hidden": self.normal(m, d, dtype=self.dtype),
            "rows": rows,
            "weight_ids": weight_ids,
            "read": self.normal(*lead, r, d) if self.chance(0.8) else None,
            "read_bias": self.normal(*lead, r) if self.chance(0.8) else None,
            "write": self.normal(*lead, r, d),
            "subtract_bias": self.normal(*lead, r)
            if subtract_projection and self.chance(0.5)
            else None,
            "coeff": self.normal(count, r) if self.chance(0.5) else None,
            "subtract_projection": subtract_projection,
            "activation": self.random.choice(ACTIVATIONS),
            "save": self.chance(0.6),
        }

    def forward_of_red(self) -> dict:
        m, d = self.random.randint(0, 7), self.random.randint(1, 40)
        rows, weight_ids, _, sets = self.selection(m)
        shape = (d,) if sets is None else (sets, d)
        return {
            "hidden": self.normal(m, d, dtype=self.dtype),
            "rows": rows,
            "weight_ids": weight_ids,
            "scale": self.normal(*shape),
            "bias": self.normal(*shape),
            "save": self.chance(0.6),
        }

    def forward_of_map(self) -> dict:
        layers, r = self.random.randint(0, 2), self.random.choice((1, 2, 3, 5))
        d = r + self.random.randint(0, 12)
        found = {
            "X": self.normal(layers, d, r, dtype=self.dtype),
            "signs": None,
            "base": None,
            "base_point": None,
        }
        if layers and self.chance(0.4):
            frame = torch.linalg.qr(self.normal(layers, d, r, dtype=torch.float64)).Q.mT
            point = base_point(frame.float())
            found |= {"signs": point.signs, "base": point.reflectors, "base_point": point.R}
        elif self.chance(0.5):
            found["signs"] = 1 - 2 * torch.randint(2, (layers, r), generator=self.generator).float()
        return found | {"W": self.normal(layers, r, d) if self.chance(0.5) else None}

    def arguments(self, name: str) -> dict:
        kind = name.split("_")[0]
        draw = {"edit": self.forward_of_edit, "red": self.forward_of_red}.get(
            kind, self.forward_of_map
        )
        found = draw()
        if "backward" not in name:
            return found
        forward = getattr(torch.ops.reft_kernels, kind).default
        if "save" in found:
            found["save"] = True
        made = forward(*(found[key] for key in argument_names(kind)))
        if kind in ("edit", "red"):
            found["grad"] = self.normal(*found["hidden"].shape, dtype=self.dtype)
            whole = made[0] if kind == "edit" else found["hidden"]
            found["saved_input"] = whole if found["rows"] is None else made[1]
            found["need_hidden"], found["need_weights"] = self.chance(0.7), self.chance(0.7)
            if kind == "edit":
                found["u"], found["z"] = made[2:]
        else:
            found["aux"] = made[2]
            for key, like in (("grad_R", made[0]), ("grad_D", made[0])):
                found[key] = self.normal(*like.shape) if self.chance(0.7) else None
        return {key: found[key] for key in argument_names(name)}


# ---- Mutations: each takes a Draw, a tensor and its name, and returns a changed tensor


def _dtype(draw: Draw, t: Tensor, name: str) -> Tensor:
    return t.to(draw.random.choice(WRONG_DTYPES))


def _resized(draw: Draw, t: Tensor, name: str) -> Tensor:
    shape = list(t.shape)
    if shape:
        at = draw.random.randrange(len(shape))
        shape[at] = max(
            0, draw.random.choice((0, 1, shape[at] - 1, shape[at] + 1, 2 * shape[at], 257))
        )
    return torch.zeros(shape, dtype=t.dtype)


def _fewer_dims(draw: Draw, t: Tensor, name: str) -> Tensor:
    return t.flatten() if t.dim() != 1 or draw.chance(0.5) else t.sum().to(t.dtype)


def _more_dims(draw: Draw, t: Tensor, name: str) -> Tensor:
    return t.unsqueeze(draw.random.randint(0, t.dim()))


def _transposed(draw: Draw, t: Tensor, name: str) -> Tensor:
    return t.mT if t.dim() >= 2 else t


def _strided(draw: Draw, t: Tensor, name: str) -> Tensor:
    """Return a tensor of the same values with other strides, which is a valid argument."""
    if t.dim() >= 2 and draw.chance(0.5):
        return t.mT.contiguous().mT
    return torch.stack([t, t], -1)[..., 0]


def _expanded(draw: Draw, t: Tensor, name: str) -> Tensor:
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def _no_memory(draw: Draw, t: Tensor, name: str) -> Tensor:
    return t.to("meta")


def _values(draw: Draw, t: Tensor, name: str) -> Tensor:
    """Change one integer, which may then be invalid; multiply floating-point values by 2."""
    if t.dtype.is_floating_point or t.is_complex() or t.numel() == 0:
        return t * 2 if t.dtype in TOLERANCE else t
    t = t.clone()
    flat = t.view(-1)
    high = 2**31 - 1
    value = draw.random.choice((-2, -1, 0, 7, 100000, high, -high - 1, int(flat[0])))
    flat[draw.random.randrange(flat.numel())] = value
    return t


def _sparse(draw: Draw, t: Tensor, name: str) -> Tensor:
    return t.to_sparse()


def _inside(first: object, t: Tensor) -> Tensor:
    """Return a view of the first argument in the shape of ``t``, or ``t`` if it does not fit."""
    if (
        not isinstance(first, Tensor)
        or first.layout != torch.strided
        or first.dtype != t.dtype
        or not first.is_contiguous()
    ):
        return t
    flat = first.view(-1)
    return t if t is first or t.numel() > flat.numel() else flat[: t.numel()].view(t.shape)


MUTATIONS = (
    _dtype,
    _dtype,
    _resized,
    _resized,
    _resized,
    _fewer_dims,
    _more_dims,
    _transposed,
    _strided,
    _strided,
    _expanded,
    _no_memory,
    _values,
    _values,
    _values,
    _sparse,
)
ACTIVATION_NAMES = ("", "LINEAR", "swish", "no such activation", *ACTIVATIONS)


def _with_rank(draw: Draw, args: dict, rank: int) -> None:
    """Change the rank of all weights and per-row tensors consistently.

    The rank is then the only reason to reject the call.
    """
    r = args["write"].shape[-2]
    for key in ("read", "write"):
        if args.get(key) is not None:
            shape = list(args[key].shape)
            shape[-2] = rank
            args[key] = draw.normal(*shape)
    for key in ("read_bias", "subtract_bias", "coeff", "u", "z"):
        if args.get(key) is not None and args[key].dim() and args[key].shape[-1] == r:
            args[key] = draw.normal(*args[key].shape[:-1], rank, dtype=args[key].dtype)


def mutate(draw: Draw, args: dict) -> list[str]:
    """Change up to two entries of ``args`` in place; return a description of each change."""
    said = []
    for _ in range(draw.random.choice((0, 1, 1, 1, 1, 2))):
        name = draw.random.choice(list(args))
        value = args[name]
        if "write" in args and not said and draw.chance(0.03):
            _with_rank(draw, args, draw.random.choice((256, 257, 600)))
            said.append("rank")
        elif isinstance(value, Tensor) and draw.chance(0.05):
            args[name] = _inside(next(iter(args.values())), value)
            said.append(f"{name} inside the first")
        elif isinstance(value, Tensor):
            mutation = draw.random.choice(MUTATIONS)
            if draw.chance(0.1):
                args[name] = None
                said.append(f"{name} None")
            elif value.device.type == "cpu" and value.layout == torch.strided:
                args[name] = mutation(draw, value, name)
                said.append(f"{name} {mutation.__name__.strip('_')}")
        elif isinstance(value, bool):
            args[name] = not value
            said.append(f"{name} {not value}")
        elif isinstance(value, str):
            args[name] = draw.random.choice(ACTIVATION_NAMES)
            said.append(f"{name} {args[name]!r}")
        else:
            tensors = [t for t in args.values() if isinstance(t, Tensor)]
            other = draw.random.choice(tensors or [torch.ones(2, 2)])
            args[name] = other.clone() if other.device.type == "cpu" else other
            said.append(f"{name} another tensor")
    return said


# ---- Running one case


def _readable(t: object) -> bool:
    return isinstance(t, Tensor) and t.device.type == "cpu" and t.layout == torch.strided


def _bits(t: Tensor) -> Tensor:
    """Return a contiguous copy as bytes, so that equal NaN values compare equal."""
    return (
        t.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        if t.dim()
        else t.clone()
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _doubled(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.dtype.is_floating_point else value


def _listed(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _compare(
    name: str, args: dict, before: dict, got: list[Tensor], want: list[Tensor], dtype: torch.dtype
) -> None:
    rows = args.get("rows")
    returned = [r.name for r in getattr(torch.ops.reft_kernels, name).default._schema.returns]
    labels = (["first"] if name.endswith("_") else []) + returned
    for label, a, b in zip(labels, got, want, strict=True):
        assert a.shape == b.shape, f"{label}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        if rows is not None and a.numel() and label == "saved_input":
            # saved_input is undefined for skipped entries
            a, b = (a[rows >= 0], b[rows >= 0])
        if a.numel() == 0:
            continue
        error, size = float((a.double() - b.double()).abs().max()), float(b.double().abs().max())
        assert error <= TOLERANCE[dtype] * (1 + size), (
            f"{label}: error {error:.2e} at size {size:.2e}"
        )
    if rows is not None and labels[0] in ("first", "out", "grad_hidden") and got[0].numel():
        untouched = torch.ones(got[0].shape[0], dtype=torch.bool)
        untouched[rows[rows >= 0].long()] = False
        first = before[next(iter(before))]
        assert _same(_bits(got[0][untouched]), _bits(first[untouched])), (
            "a row that is not selected changed"
        )


def _made_by_a_forward(args: dict, drawn: dict) -> bool:
    """Return whether a backward has the values of its forward; else its results are undefined."""
    if "aux" in args:
        keys = [k for k in ("X", "base", "aux") if args[k] is not None]
        return all(drawn[k] is not None and torch.equal(args[k], drawn[k]) for k in keys)
    if "u" in args and args["rows"] is not None:
        return not args["u"][args["rows"] < 0].any()  # zero for a skipped entry
    return True


def run_case(seed: int, backend: str) -> str:
    """Run one case.

    Args:
        seed: Determines the operator and its arguments.
        backend: The backend to test.

    Returns:
        The name of the exception that the call raised; ``"right"`` if its results are correct;
        ``"without values"`` or ``"of no forward"`` if they cannot be compared.

    Raises:
        AssertionError: If the results are wrong or the call changed a tensor that it must not
            change.
    """
    # Triton has no fp64 kernels
    draw = Draw(seed, tuple(t for t in DTYPES if backend != "triton" or t != torch.float64))
    name = draw.random.choice(list(ops.SCHEMAS))
    with rk.backend("torch"):
        args = draw.arguments(name)
    drawn = dict(args)
    said = mutate(draw, args)
    first = next(iter(args))
    before = {k: v.clone() for k, v in args.items() if _readable(v)}
    exact = {k: _doubled(v.clone() if isinstance(v, Tensor) else v) for k, v in args.items()}
    operator = getattr(torch.ops.reft_kernels, name).default
    where = f"seed {seed}, {name}, {', '.join(said) or 'valid'}"
    try:
        result = operator(*args.values())
    except ALLOWED as error:
        assert said, f"{where}: a valid call raised {error!r}"
        for key, was in before.items():
            assert _same(_bits(args[key]), _bits(was)), (
                f"{where}: {key} changed though the call raised {error!r}"
            )
        return type(error).__name__
    for key, was in before.items():
        if not (name.endswith("_") and key == first):
            assert _same(_bits(args[key]), _bits(was)), f"{where}: {key} changed"
    if not all(_readable(t) for t in _listed(result)):
        return "without values"
    if not _made_by_a_forward(args, drawn):
        return "of no forward"
    with rk.backend("torch"):
        reference = operator(*exact.values())
    got, want = _listed(result), _listed(reference)
    if name.endswith("_"):
        got, want = [args[first], *got], [exact[first], *want]
    like = next(args[k] for k in ("hidden", "grad", "X") if k in args)
    try:
        _compare(name, args, before, got, want, like.dtype)
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from None
    return "right"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuzz the operators of reft_kernels.")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--cases", type=int, default=1000)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ends = collections.Counter()
    with rk.backend(asked.backend):
        for seed in range(asked.first, asked.first + asked.cases):
            print(f"seed {seed}", flush=True)
            ends[run_case(seed, asked.backend)] += 1
    print("ends", dict(ends), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
