"""Whatever parameters, gradients and settings there are, the optimizer is Algorithm 1: 2,000 generated cases.

Each case is an optimizer with one to three groups of small tensors and one to three outer steps, against the
transcription. All of them are the same in every run, a sample is of others; what reproduces a failing one is printed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.algorithm1 import adam, adamw, sgd
from tests.compare import LOW_PRECISION, dense
from tests.conftest import Duel
from tests.sampling import sample

CASES = {"float64": 800, "float32": 400, "low precision": 400, "several dtypes": 400}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BASES = {"sgd": (torch.optim.SGD, sgd), "adam": (torch.optim.Adam, adam), "adamw": (torch.optim.AdamW, adamw)}


def profile(name: str) -> Callable[[Callable], Callable]:
    all_of_them = sample.everything
    chosen = settings(
        max_examples=CASES[name] if all_of_them else CASES[name] // 16,
        deadline=None,
        derandomize=all_of_them,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    return lambda test: chosen(test if all_of_them else seed(sample.seed)(test))


def rounded(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers with two digits: nothing depends on the others, and a failing case can be read."""
    return st.sampled_from([n / 100 for n in range(round(low * 100), round(high * 100) + 1)])


SHAPES = st.one_of(
    st.sampled_from([(), (1,), (0,), (3, 0, 2), (1, 1, 1), (17,), (64,), (257,), (1023,), (4999,), (71, 67)]),
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Any]:
    """Shape and memory layout of a parameter, and of its gradients."""
    shape = draw(SHAPES)
    dims = st.permutations(range(len(shape))).map(tuple)
    return {
        "shape": shape,
        "dtype": draw(st.sampled_from(DTYPES)),
        "order": draw(dims),
        "offset": draw(st.integers(0, 5)),
        "gradient": draw(st.sampled_from(["as it is", "contiguous", "other order", "not dense"])),
        "gradient_order": draw(dims),
    }


@st.composite
def hypers(draw: st.DrawFn, base: str) -> dict[str, Any]:
    """Settings of the base optimizer."""
    if base == "sgd":
        momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
        nesterov = momentum > 0 and draw(st.booleans())
        return {
            "lr": draw(rounded(0.01, 0.3)),
            "momentum": momentum,
            "nesterov": nesterov,
            "dampening": 0.0 if nesterov else draw(rounded(0.0, 0.5)),
            "weight_decay": draw(st.sampled_from([0.0, 0.07])),
            "maximize": draw(st.booleans()),
        }
    return {
        "lr": draw(rounded(0.01, 0.1)),
        "betas": (draw(rounded(0.0, 0.95)), draw(rounded(0.5, 0.99))),
        "eps": draw(st.sampled_from([3e-3, 1e-2])),  # 1 / eps magnifies the rounding of small gradients
        "weight_decay": draw(st.sampled_from([0.0, 0.07])),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    base = draw(st.sampled_from(sorted(BASES)))
    reuse = draw(st.booleans())
    k = draw(st.sampled_from([3, 2, 1, 4]))
    groups = draw(st.lists(st.lists(tensors(), min_size=1, max_size=3), min_size=1, max_size=3))
    own = st.fixed_dictionaries(
        {},
        optional={
            "lr": rounded(0.01, 0.1),
            "rho": rounded(0.0, 0.5),
            "adaptive": st.booleans(),
            "eta": rounded(0.0, 0.3),
            "weight_decay": rounded(0.0, 0.1),
        },
    )
    steps = draw(st.sampled_from([2, 1, 3]))
    evaluations = k + 1 if reuse else 2 * k
    count = sum(map(len, groups))
    # tensor 0 keeps its gradients: an evaluation without any is an error
    gaps = st.tuples(
        st.integers(0, steps - 1), st.integers(0, evaluations - 1), st.integers(min(1, count - 1), count - 1)
    )
    whole_steps = st.tuples(st.integers(0, steps - 1), st.integers(min(1, count - 1), count - 1))
    missing = draw(st.sets(gaps, max_size=6)) if count > 1 else set()
    if count > 1:
        missing |= {(t, e, i) for t, i in draw(st.sets(whole_steps, max_size=2)) for e in range(evaluations)}
    return {
        "base": base,
        "hyper": draw(hypers(base)),
        "groups": [(members, draw(own)) for members in groups],
        "options": {
            "k": k,
            "alpha": draw(st.sampled_from(["adaptive"] * 3 + [0.3, 0.5, 0.7, 1.0])),
            "alpha_scope": draw(st.sampled_from(["global", "tensor"])),
            "rho": draw(st.sampled_from([0.3, 0.01, 0.08, 2.0, 0.0])),
            "adaptive": draw(st.booleans()),
            "eta": draw(rounded(0.0, 0.3)),
            "reuse_gradient": reuse,
            "max_grad_norm": draw(st.sampled_from([None, 0.2, 3.0, 20.0])),
        },
        "form": draw(st.sampled_from(["step", "evaluations"] + ["pairs"] * (not reuse))),
        "steps": steps,
        "missing": missing,
        "seed": draw(st.integers(0, 2**16)),
    }


def duel(backend: str, case: dict[str, Any], dtype: torch.dtype | None, **options: Any) -> Duel:
    """``dtype`` None: each tensor has the one that was drawn for it."""
    generator = torch.Generator().manual_seed(case["seed"])

    def parameter(tensor: dict[str, Any]) -> nn.Parameter:
        values = torch.randn(tensor["shape"], generator=generator, dtype=torch.float64)
        return nn.Parameter(dense(values.to(dtype or tensor["dtype"]), tensor["order"], tensor["offset"]))

    def gradient_layout(i: int, g: Tensor) -> Tensor:
        kind, order = members[i]["gradient"], members[i]["gradient_order"]
        if kind == "as it is":
            return g
        if kind == "not dense":
            return torch.full((*g.shape, 3), math.nan, dtype=g.dtype)[..., 1].copy_(g)
        return dense(g, order if kind == "other order" else None, 1)

    members = [tensor for tensors, _ in case["groups"] for tensor in tensors]
    groups = [{"params": [parameter(tensor) for tensor in tensors], **own} for tensors, own in case["groups"]]
    return Duel(
        backend,
        groups,
        BASES[case["base"]],
        case["hyper"],
        case["options"],
        form=case["form"],
        missing=case["missing"],
        gradient_layout=gradient_layout,
        seed=case["seed"],
        **options,
    )


@given(cases())
@profile("float64")
def test_float64(backend: str, case: dict[str, Any]) -> None:
    trial = duel(backend, case, torch.float64)
    for _ in range(case["steps"]):
        trial.step()
        trial.check(1e-13)


@given(cases())
@profile("float32")
def test_float32(backend: str, case: dict[str, Any]) -> None:
    """Against float64; 2e-6 is 32 roundings of a number of the size of one."""
    trial = duel(backend, case, torch.float32, oracle_dtype=torch.float64)
    for _ in range(case["steps"]):
        trial.step()
        trial.check(2e-6)


def rounded_weights(backend: str, case: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Against float64 arithmetic with rounded weights. The gradient does not depend on the weights, and each step
    starts from the same ones, so that a weight rounded to the other side makes no difference to anything else."""
    trial = duel(backend, case, dtype, arithmetic=torch.float64, curvature=0.0)
    for _ in range(case["steps"]):
        trial.step()
        trial.check(2e-6)
        trial.synchronise()


@given(cases(), st.sampled_from(LOW_PRECISION))
@profile("low precision")
def test_low_precision(backend: str, case: dict[str, Any], dtype: torch.dtype) -> None:
    rounded_weights(backend, case, dtype)


@given(cases())
@profile("several dtypes")
def test_several_dtypes(backend: str, case: dict[str, Any]) -> None:
    rounded_weights(backend, case, None)
