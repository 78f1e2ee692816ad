"""One pass by itself: its arguments in every form, and the comparison with the reference in float64.

The table of cases that every backend's kernels are run on: ``cases``.
"""

import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lookbehind_fused.kernels import SCHEMAS, Flag, RuleId, contract, native, reference
from lookbehind_fused.kernels.contract import Column
from lookbehind_fused.kernels.device import SPAN
from lookbehind_fused.kernels.schema import ARGUMENTS, WRITTEN, tensor_table
from tests.compare import LOW_PRECISION, assert_equal, dense, scaled_error

OPS = {name: getattr(torch.ops.lookbehind_fused, name).default for name in SCHEMAS}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of one pass: eight roundings of a number of the size of one, and two units that a GPU's division (div.full.f32) may be
# off. Whole steps have 2e-6 and 1e-12 elsewhere.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 7e-7, torch.bfloat16: 7e-7, torch.float16: 7e-7}

# name: rule, flags
RULES = {
    "none": (RuleId.NONE, 0),
    "sgd": (RuleId.SGD, 0),
    "sgd-maximize": (RuleId.SGD, Flag.MAXIMIZE),
    "momentum": (RuleId.MOMENTUM, 0),
    "nesterov": (RuleId.MOMENTUM, Flag.NESTEROV | Flag.MAXIMIZE),
    "adam": (RuleId.ADAM, 0),
    "adam-amsgrad": (RuleId.AMSGRAD, Flag.MAXIMIZE),
    "adamw": (RuleId.ADAM, Flag.DECOUPLED),
    "adamw-amsgrad": (RuleId.AMSGRAD, Flag.DECOUPLED),
}
DERIVABLE = [rule for rule, (number, flags) in RULES.items() if contract.BUFFERS[number] and not flags & Flag.NESTEROV]
# Hyperparameters of two groups, none at its default. Adam's moments are interpolated from either end: beta1 < 1/2.
COMMON = [(0.3, 0.03, 0.3, 1.5, 0.75), (0.2, 0.05, 0.6, 1.1, 0.5)]  # rho, eta, alpha, max_grad_norm, unscale
OWN = [
    {"lr": 0.11, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02, "beta1": 0.8, "beta2": 0.97, "eps": 1e-3},
    {"lr": 0.17, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.05, "beta1": 0.4, "beta2": 0.96, "eps": 2e-3},
]
BUFFERS = {"perturbed", "slow", "fast", "fast_from", "first", "state", "state_from"}
SIZES = [7, 1, 0, 130, 16_385, 33, 512, 1000]
DESCENTS = [name for name in SCHEMAS if name.startswith("descend")]
VARIANTS = [(name, rule) for name in SCHEMAS for rule in (RULES if name in DESCENTS else ["none"])]


class Case:
    """The arguments of one op, with numbers of the size of one in all of them and NaN in all memory between.

    Args:
        name: of the op.
        sizes: elements of each tensor; a tuple is a shape. Tensors begin at odd addresses.
        flags: beside those of the rule.
        apart: old values are read from other buffers than those that are written.
        unkept: there is no buffer for the fast weights (descend, descend_ascend), for fast_1 (descend_align) or for the
            slow weights (ascend: not the first of a step).
        listed: the parameters come as a list; otherwise by the addresses in ``table``.
        row: the bucket's own row of ``sq_norms``, filled by a pass that ascends; -1 leaves it as it is.
        broken: a gradient has a NaN, or where ``sq_norms`` are left as they are, they have an inf.
        large: gradients (reduce_sq_norm) or moves (descend_align) are so large that their squares are no float32.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        sizes: list[Any],
        rule: str = "none",
        flags: int = 0,
        *,
        apart: bool = True,
        unkept: bool = False,
        listed: bool = True,
        row: int = 1,
        broken: bool = False,
        large: bool = False,
        seed: int = 0,
    ) -> None:
        self.name, self.dtype, self.listed = name, dtype, listed
        self.generator = torch.Generator().manual_seed(seed)
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.shapes = [(size,) if isinstance(size, int) else size for size in sizes]
        count, unit, start = len(sizes), 64 // self.compute.itemsize, 16
        self.spans = []
        for shape in self.shapes:
            self.spans.append(slice(start, start + torch.Size(shape).numel()))
            start += -(-torch.Size(shape).numel() // unit) * unit
        self.size = start + 5
        self.rule, own_flags = RULES[rule]
        states = contract.BUFFERS[self.rule]
        groups = [0 if t % 3 != 1 else 2 for t in range(count)]
        table = [[count - 1 - t, s.start, s.stop - s.start, groups[t]] for t, s in enumerate(self.spans)]
        low = dtype in LOW_PRECISION
        rows = count if flags & Flag.PER_TENSOR else 2 if name == "interpolate" else 1
        sums = torch.rand(rows, 3, generator=self.generator, dtype=torch.float64) * 0.5 + 1.0
        everything = {
            "params": [self.tensor(shape, t % 3) for t, shape in enumerate(self.shapes)],
            "grads": [self.tensor(shape, (t + 1) % 4) for t, shape in enumerate(self.shapes)],
            "perturbed": self.buffer() if low else None,
            "slow": None if unkept and name == "ascend" else self.buffer(),
            "fast": None if unkept and name in ("descend", "descend_ascend") else self.buffer(),
            "fast_from": self.buffer() if apart or unkept else None,
            "first": None if unkept else self.buffer(),
            "state": [self.buffer(positive=s > 0) for s in range(states)],
            "state_from": [self.buffer(positive=s > 0) for s in range(states)] if apart else [],
            "steps": torch.arange(count, dtype=torch.float32) % 4 + bool(flags & Flag.DERIVES),
            "steps_from": 1 + torch.arange(count, dtype=torch.float32).flip(0) % 3 if apart else None,
            "table": torch.tensor(table, dtype=torch.int64).view(-1, Column.ADDRESS),
            "sq_norms": torch.tensor([[3.0, 4.0], [1.5, 2.0]], dtype=torch.float64),
            "row": row,
            "hyper": self.hyper(clips=seed // 2 % 2 == 0),
            "rule": int(self.rule),
            "flags": int(own_flags | flags),
            "sums": sums if name == "interpolate" else torch.full_like(sums, float("nan")),
            "done": torch.zeros(1, dtype=torch.int32) if seed % 2 == 0 else None,
            "dtype": dtype,
        }
        if flags & Flag.DERIVES and "slow" in ARGUMENTS[name]:
            everything["fast"] = everything["slow"].clone()
        if large and name == "reduce_sq_norm":
            for g in everything["grads"]:
                g.mul_(min(torch.finfo(dtype).max / 8, 4e37))  # no number is beyond 8
        elif large:  # what the fast weights move by, as far as the parameters can
            for moves in everything["state_from"][:1] or everything["grads"]:
                moves.mul_(min(torch.finfo(dtype).max / 1e3, 1e25))
        if broken and row >= 0 and name in ("ascend", "descend_ascend"):
            everything["grads"][-1].view(-1)[-1] = float("nan")
        elif broken:
            everything["sq_norms"][0, 1] = float("inf")
        if broken and low:  # parameters that do not move are not written either: they are the image of these
            for p, span in zip(everything["params"], self.spans, strict=True):
                p.view(-1).copy_(everything["perturbed"][span])
        self.arguments = {key: everything[key] for key in ARGUMENTS[name]}

    def hyper(self, clips: bool) -> Tensor:
        """Rows 0 and 2 are the groups'; nobody's row is between them, and nobody's number at their end. Where gradients
        are clipped, their scale is lost.
        """
        hyper = torch.full(
            (3, len(COMMON[0]) + len(contract.NUMBERS[self.rule]) + 1), float("nan"), dtype=torch.float64
        )
        for row, common, own in zip((0, 2), COMMON, OWN, strict=True):
            rho, eta, alpha, most, unscale = common
            numbers = [own[name] for name in contract.NUMBERS[self.rule]]
            hyper[row, :-1] = torch.tensor(
                [rho, eta, alpha, most if clips else 1e3, unscale, *numbers], dtype=torch.float64
            )
        return hyper

    def random(self, shape: Any) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def tensor(self, shape: Any, offset: int) -> Tensor:
        return dense(self.random(shape).to(self.dtype), None, offset)

    def buffer(self, positive: bool = False) -> Tensor:
        buffer = torch.full((self.size,), float("nan"), dtype=self.compute)
        for span in self.spans:
            values = self.random((span.stop - span.start,))
            buffer[span] = (values.abs() if positive else values).to(self.compute)
        return buffer

    def copies(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments with memory of their own, at the same offsets; with ``dtype``, what is walked over is in it."""

        def one(key: str, value: Any) -> Any:
            if isinstance(value, list):
                return [one(key, entry) for entry in value]
            if not isinstance(value, Tensor):
                return dtype or value if key == "dtype" else value
            if key in ("params", "grads"):
                return dense(value.to(dtype or value.dtype), None, value.storage_offset())
            return value.clone().to(dtype if key in BUFFERS and dtype else value.dtype)

        return {key: one(key, value) for key, value in self.arguments.items()}

    def run(self, backend: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """All arguments after the op has run on copies of them."""
        arguments = self.copies(dtype)
        by_address = backend is not reference and not self.listed
        getattr(backend, self.name)(**(self.by_address(arguments) if by_address else arguments))
        return arguments

    def by_address(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same with the parameters' addresses and layouts in ``table``."""
        layouts = tensor_table(arguments["params"], *[[0] * len(self.spans)] * 2)
        return {**arguments, "table": torch.cat([arguments["table"], layouts[:, Column.ADDRESS :]], 1)}

    def check(self, backend: Any = native) -> None:
        """A backend against the reference in float64: what is written, and that nothing else is."""
        found, expected = self.run(backend), self.run(reference, torch.float64)
        self.check_written(found, expected)
        for key, before in self.arguments.items():
            for value, a, e in zip(
                listed_values(before), listed_values(found[key]), listed_values(expected[key]), strict=True
            ):
                if isinstance(value, Tensor) and key not in WRITTEN[self.name]:
                    assert_equal(f"{self.name}: {key} of {backend.__name__}", a, value)
                    assert_equal(f"{self.name}: {key} of the reference", e, value.to(e.dtype))
                elif isinstance(value, Tensor) and key in BUFFERS:
                    between = blanked(value, self.spans)
                    assert_equal(f"{self.name}: {key} between the tensors", blanked(a, self.spans), between)

    def check_written(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        """What the op writes, tensor by tensor."""
        for key in WRITTEN[self.name]:
            for i, (a, e) in enumerate(zip(listed_values(found[key]), listed_values(expected[key]), strict=True)):
                if a is not None:
                    for part in self.spans if key in BUFFERS else [...]:
                        self.compare(f"{self.name}: {key}[{i}]", key, a[part], e[part])

    def compare(self, what: str, key: str, a: Tensor, e: Tensor) -> None:
        assert bool(e.isfinite().all()) or key in ("sums", "sq_norms"), what
        if key in ("steps", "done"):
            assert_equal(what, a, e)
            return
        if key == "params" and self.dtype in LOW_PRECISION:  # one rounding, and the boundary may be on the other side
            near = e.abs() * (torch.finfo(self.dtype).eps / 2) + torch.finfo(self.dtype).smallest_normal * 2**-10
            beyond = ((a.double() - e).abs() - near).clamp(min=0)
            error = scaled_error(beyond, torch.zeros_like(beyond))
        else:
            if key in ("sums", "sq_norms"):  # rows of nobody stay NaN, a broken gradient has such a norm
                a, e = (x.nan_to_num(nan=-7.0) for x in (a, e))
            error = scaled_error(a, e)
        assert error <= TOLERANCE[self.dtype], f"{what}: {error:.2e}"


def listed_values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def blanked(buffer: Tensor, spans: list[slice]) -> Tensor:
    """What lies between the tensors of a flat buffer."""
    buffer = buffer.clone()
    for span in spans:
        buffer[span] = 0.0
    return buffer


# ---- each pass -------------------------------------------------------------------------------------------------------


def cases(dtype: torch.dtype, name: str, rule: str, sizes: list[Any] = SIZES) -> Iterator[Case]:
    """Every way to call a pass: ASAM or not, in place or not, sums by tensor or not, the norm in it or before it, fast
    weights read, derived or not kept, parameters listed or by address; squares that are no float32.
    """
    if name == "reduce_sq_norm":  # a program of it takes as much as eight of others: here two of them share a tensor
        sizes = [*sizes, SPAN + 5_137]
    scopes = (0, Flag.PER_TENSOR) if name in ("descend_align", "interpolate") else (0,)
    scaled = (0, Flag.ADAPTIVE) if name in ("reduce_sq_norm", "ascend", "descend_ascend") else (0,)
    apart = (True, False) if name in DESCENTS else (True,)
    rows = (1, -1) if name in ("ascend", "descend_ascend") else (1,)
    kept = (False, True) if name in ("ascend", *DESCENTS) else (False,)
    derives = (0, Flag.DERIVES) if name in DESCENTS and rule in DERIVABLE else (0,)
    number = 0
    for scope, t, a, row, unkept, d in itertools.product(scopes, scaled, apart, rows, kept, derives):
        if not (d and name == "descend_align" and not unkept):  # fast_1 is derived only where it is not kept
            options = {"apart": a, "row": row, "unkept": unkept, "listed": number % 2 == 0}
            yield Case(name, dtype, sizes, rule, scope | t | d, seed=number, **options)
            number += 1
    if rule in ("adam", "adam-amsgrad"):  # the second moment would be infinite by the large weights' decay
        derives = (0,)
    for t, d in itertools.product(scaled, derives) if name in ("reduce_sq_norm", "descend_align") else ():
        options = {"unkept": bool(d), "listed": number % 2 == 0, "large": True}
        yield Case(name, dtype, sizes, rule, t | d, seed=number, **options)
        number += 1
    if name in ("ascend", *DESCENTS):
        for broken, a, row, unkept in itertools.product((True, False), apart, rows, kept):
            options = {"apart": a, "row": row, "unkept": unkept, "listed": number % 2 == 0, "broken": broken}
            yield Case(name, dtype, sizes, rule, Flag.SKIPS | scaled[number % len(scaled)], seed=number, **options)
            number += 1


def drawn(
    dtype: torch.dtype, names: Collection[str], sizes: list[Any], most: int, seed: int
) -> Iterator[tuple[int, Case]]:
    """``most`` cases of these passes at random, of each pass as many as of any other, each with its number among those
    of its pass and rule.
    """
    generator, times = random.Random(seed), Counter()

    def turn(variant: tuple[str, str]) -> int:
        times[variant[0]] += 1
        return times[variant[0]]

    variants = [variant for variant in VARIANTS if variant[0] in names]
    variants = sorted(generator.sample(variants, len(variants)), key=turn)
    for name, rule in itertools.islice(itertools.cycle(variants), most):
        yield generator.choice(list(enumerate(cases(dtype, name, rule, sizes), 1)))
