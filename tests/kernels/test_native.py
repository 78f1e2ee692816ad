"""The native ops by themselves: each pass against the reference in float64, on every instruction set and thread count.

What the optimizer does with them is tested elsewhere, for every backend alike.
"""

import hashlib
import inspect
import itertools
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import Lookbehind
from lookbehind_fused.kernels import BACKENDS, SCHEMAS, Flag, RuleId, native, reference
from lookbehind_fused.kernels.contract import Column, Hyper
from lookbehind_fused.kernels.schema import ARGUMENTS, WRITTEN, tensor_table
from tests.compare import LOW_PRECISION, assert_equal, dense, scaled_error
from tests.conftest import Duel, assert_close, drive
from tests.kernels.passes import DESCENTS, DTYPES, OPS, SIZES, VARIANTS, Case, cases, drawn, listed_values
from tests.sampling import sample
from tests.test_tensors import OPTIONS, parameters
from tests.test_tensors import RULES as BASES
from tests.twin import BASES as TWINS

ROOT = Path(__file__).resolve().parents[2]


def check_conversions() -> None:
    """All values of 16 bits are read exactly, and float32 is rounded as torch rounds: see the test of that name."""
    for dtype in LOW_PRECISION:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        case = Case("ascend", dtype, [patterns.numel()], row=-1)
        arguments = case.copies()
        arguments["params"][0].copy_(patterns)
        arguments["grads"][0].fill_(-0.0)
        native.ascend(**arguments)
        assert_bits(f"{dtype} as a weight", arguments["slow"][case.spans[0]], patterns.float())
        assert_bits(f"{dtype} there and back", arguments["params"][0], patterns)

        case = Case("descend", dtype, [patterns.numel()], "sgd")
        arguments = case.copies()
        arguments["grads"][0].copy_(patterns)
        arguments["fast_from"].fill_(-0.0)
        arguments["hyper"][:, :-1] = torch.tensor([0.0, 0.0, 1.0, float("inf"), 1.0, -1.0, 0.0, 0.0, 0.0])
        native.descend(**arguments)
        assert_bits(f"{dtype} as a gradient", arguments["fast"][case.spans[0]] + 0.0, patterns.float() + 0.0)

        high = torch.arange(2**16, dtype=torch.int64)[:, None] * 2**16
        steps = torch.arange(16)[:, None] * 2**12 + torch.tensor([-1, 0, 1])  # 2^12 is half a unit of fp16
        bits = (high + (steps.flatten() % 2**16)).flatten()
        bits = torch.cat([bits, torch.randint(2**32, (500_000,), generator=torch.Generator().manual_seed(1))])
        values = torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)
        case = Case("descend_align", dtype, [values.numel()], "none")
        arguments = case.copies()
        arguments["fast"][case.spans[0]] = values
        native.descend_align(**arguments)
        assert_bits(f"float32 kept beside {dtype}", arguments["perturbed"][case.spans[0]], values)
        assert_bits(f"float32 as {dtype}", arguments["params"][0], values.to(dtype))


def assert_bits(what: str, actual: Tensor, expected: Tensor) -> None:
    """The same bits, the sign of zero included; NaN stays NaN, whichever."""
    assert actual.dtype == expected.dtype
    kind = {2: torch.int16, 4: torch.int32}[actual.dtype.itemsize]
    same = (actual.contiguous().view(kind) == expected.contiguous().view(kind)) | (actual.isnan() & expected.isnan())
    wrong = (~same).nonzero().flatten()[:5]
    assert not len(wrong), f"{what}: {int((~same).sum())} differ, as {actual[wrong]} for {expected[wrong]}"
    assert not bool((actual.isnan() ^ expected.isnan()).any())


@pytest.mark.sample(24)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "rule"), VARIANTS)
def test_a_pass_is_the_reference_in_float64(name: str, rule: str, dtype: torch.dtype) -> None:
    """To a few roundings; what is not to be written is not, nor what lies between the tensors."""
    for case in cases(dtype, name, rule):
        case.check()


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "interpolate"])
def test_gradients_of_another_layout(name: str) -> None:
    """Whether parameters come as a list or by address: the gradient's elements go where the parameter has them."""
    shapes = [(3, 4, 5, 2), (6, 4), (5,), (), (2, 1, 3), (1, 7)]
    for listed in (True, False):
        case = Case(name, torch.float32, shapes, "momentum" if name in DESCENTS else "none", listed=listed)
        case.check()  # the reference's results are what the others are then compared with
        contiguous = case.run(native)
        order = [dense(g, tuple(reversed(range(g.dim()))), 1) for g in case.arguments["grads"]]
        strided = [g.new_full((*g.shape, 2), float("nan")).select(-1, 1).copy_(g) for g in case.arguments["grads"]]
        for grads in (order, strided):
            case.copies = lambda dtype=None, case=case, grads=grads: {**Case.copies(case, dtype), "grads": grads}
            found = case.run(native)
            for key in WRITTEN[name]:
                for a, e in zip(listed_values(found[key]), listed_values(contiguous[key]), strict=True):
                    if a is not None:
                        assert_equal(key, a, e)


def test_streamed_results() -> None:
    """Beyond 8 M elements results go past the caches: tails, unaligned parameters and what lies between as before."""
    sizes = [5_000_011, 3, 3_400_001]
    streamed = [
        ("ascend", torch.float32, sizes, "none"),
        ("descend_ascend", torch.float32, sizes, "adam"),
        ("descend_interpolate", torch.float32, sizes, "momentum"),
        ("descend_align", torch.bfloat16, [8_400_001], "sgd"),
    ]
    for name, *case in sample(streamed, 1):
        Case(name, *case, unkept=name == "descend_ascend").check()


# rho, eta, alpha (which this pass has no use for), max_grad_norm, unscale, lr, beta1, beta2, eps, weight decay
A_LITTLE_OFF = [1.01, 1.01, 1.0, 1.01, 1.01, 1.001, 1.0001, 1.0001, 1.5, 1.01]


@pytest.mark.parametrize(
    ("key", "change", "clips"),
    [
        *[
            ("hyper", lambda x, i=i, by=by, group=group: x[group, i].mul_(by), i != Hyper.UNSCALE)
            for group in (0, 2)
            for i, by in enumerate(A_LITTLE_OFF)
            if by != 1.0
        ],
        *[("flags", lambda x, flag=flag: x ^ flag, True) for flag in (Flag.ADAPTIVE, Flag.MAXIMIZE, Flag.DECOUPLED)],
        ("row", lambda x: 0, True),
        ("fast_from", lambda x: None, True),
        ("state_from", lambda x: [], True),
        ("steps_from", lambda x: x.add_(1), True),
    ],
)
def test_a_wrong_number_is_seen(key: str, change: Any, clips: bool) -> None:
    """The comparison above notices it if native is given a number, a flag or a buffer that is not the reference's."""
    case = Case("descend_ascend", torch.float32, SIZES, "adam-amsgrad", Flag.ADAPTIVE, seed=0 if clips else 2)
    arguments = case.copies()
    changed = change(arguments[key])
    arguments[key] = arguments[key] if key == "hyper" else changed
    native.descend_ascend(**arguments)
    expected = case.run(reference, torch.float64)
    with pytest.raises(AssertionError, match=r"descend_ascend: |^steps"):
        case.check_written(arguments, expected)
    case.check_written(case.run(native), expected)


@pytest.mark.sample(14)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_tail_at_every_alignment(name: str, dtype: torch.dtype) -> None:
    """130 tensors of 1 to 130 elements: every length of a vectorised loop's tail; addresses as they come."""
    for rule in ("nesterov", "adam-amsgrad") if name in DESCENTS else ("none",):
        Case(name, dtype, list(range(1, 131)), rule, Flag.ADAPTIVE | Flag.PER_TENSOR).check()


@pytest.mark.parametrize("sizes", [[1], [()], [(), 0, (2, 0, 3), (1, 1), ()], [0, 0, 0], [(3, 5, 7), 2]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMAS)
def test_tensors_of_one_element_and_of_none(name: str, dtype: torch.dtype, sizes: list[Any]) -> None:
    for rule in ("nesterov", "adamw") if name in DESCENTS else ("none",):
        Case(name, dtype, sizes, rule, Flag.ADAPTIVE).check()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SCHEMAS)
def test_ten_thousand_tensors(name: str) -> None:
    sizes = [(37 * t) % 11 for t in range(10_000)]
    Case(name, torch.float32, sizes, "momentum" if name in DESCENTS else "none", Flag.PER_TENSOR).check()


@pytest.mark.parametrize("backend", [native, reference], ids=["native", "reference"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_empty_lists(name: str, backend: Any) -> None:
    """Nothing to do: sums are zero, the pass is done, everything else stays as it was."""
    case = Case(name, torch.float64, [], "momentum" if name in DESCENTS else "none")
    after = case.run(backend)
    for key, value in case.arguments.items():
        if key == "sq_norms" and key in WRITTEN[name]:
            expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
            assert_equal(key, after[key], expected)
        elif key == "sums" and key in WRITTEN[name]:
            assert_equal(key, after[key][0], torch.zeros(3, dtype=torch.float64))
        elif key == "done":
            assert_equal(key, after[key], torch.ones(1, dtype=torch.int32))
        else:
            for a, b in zip(listed_values(after[key]), listed_values(value), strict=True):
                assert_equal(key, a, b) if isinstance(a, Tensor) else None


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_whose_tensors_are_all_empty(base: type[torch.optim.Optimizer]) -> None:
    params = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(2, 0, dtype=torch.bfloat16))]
    optimizer = Lookbehind(params, base, lr=0.1, k=3, alpha="adaptive", adaptive=True, backend="native")

    def evaluate(_: int) -> Tensor:
        for p in params:
            p.grad = torch.zeros_like(p)
        return torch.zeros(())

    drive(optimizer, "step", evaluate, 3)
    assert optimizer.diagnostics["grad_norm"].item() == 0.0
    assert optimizer.diagnostics["alpha"].item() == 0.5  # the cosine of zero vectors is 0


@pytest.mark.slow
def test_ten_thousand_tensors_in_an_optimizer() -> None:
    """One outer step of ASAM with Adam against the transcription in float64."""
    shapes = [((37 * t) % 5,) if t % 3 else () for t in range(10_000)]
    params = parameters(*shapes, dtype=torch.float32)
    duel = Duel("native", [{"params": params, "adaptive": True}], *BASES["adam"], OPTIONS, oracle_dtype=torch.float64)
    duel.step()
    for e, (points, expected) in enumerate(zip(duel.points, duel.expected_points, strict=True)):
        assert_close(f"points at evaluation {e}", joined(points), joined(expected), 2e-6)
    assert_close("weights", joined(params), joined(duel.expected), 2e-6)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"):
        found = [torch.as_tensor(duel.optimizer.state[p][key]) for p in params]
        assert_close(key, joined(found), joined([torch.as_tensor(entry[key]) for entry in duel.base.state]), 2e-6)


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in tensors])


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, "adaptive"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_is_as_exact_as_the_reference(dtype: torch.dtype, base: str, alpha: float | str) -> None:
    """The error to float64 is at most twice the reference's own, in weights, evaluation points and state."""

    def errors(backend: str) -> dict[str, float]:
        params = parameters((5000,), (33, 71), dtype=dtype)
        groups = [{"params": params, "adaptive": True}]
        options = {**OPTIONS, "alpha": alpha}
        duel = Duel(backend, groups, *BASES[base], options, oracle_dtype=torch.float64, curvature=0.0)
        found: dict[str, float] = {}
        for _ in range(3):
            duel.step()
            found["weights"] = max(found.get("weights", 0), scaled_error(joined(params), joined(duel.expected)))
            for points, expected in zip(duel.points[1:], duel.expected_points[1:], strict=True):
                found["points"] = max(found.get("points", 0), scaled_error(joined(points), joined(expected)))
            for p, entries in zip(params, duel.base.state, strict=True):
                for key, value in entries.items():
                    actual = torch.as_tensor(duel.optimizer.base_optimizer.state[p][key])
                    found[key] = max(found.get(key, 0), scaled_error(actual, torch.as_tensor(value)))
            duel.synchronise()
        return found

    ours, theirs = errors("native"), errors("reference")
    assert set(ours) == set(theirs)
    assert theirs["weights"] > 0
    assert {key: (value, theirs[key]) for key, value in ours.items() if value > 2 * theirs[key]} == {}


def test_conversions_are_torchs() -> None:
    """Every value of 16 bits is read as it is; float32 is rounded to nearest, ties to even, as ``.to(dtype)`` does.

    All upper halves of a float32, with all lower halves that are next to or on a rounding boundary, subnormal numbers,
    overflow, infinity and NaN among them, and half a million random ones.
    """
    check_conversions()


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMAS)
def test_the_number_of_threads_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """1, 2 and 7 threads over more than 10^6 elements in tensors of odd sizes: norms, alphas by tensor, everything."""
    sizes = [1_000_003, 1, 0, 70_001, 131_072, 3, 16_385]
    case = Case(name, dtype, sizes, "adam-amsgrad" if name in DESCENTS else "none", Flag.ADAPTIVE | Flag.PER_TENSOR)
    results = []
    for threads in (1, 2, 7, 1):
        torch.set_num_threads(threads)
        results.append(case.run(native))
        if threads == 7:
            assert len(os.listdir("/proc/self/task")) >= 7, "the work was not shared at all"
    for key in WRITTEN[name]:
        for result in results[1:]:
            for a, e in zip(listed_values(result[key]), listed_values(results[0][key]), strict=True):
                if a is not None:
                    assert_equal(f"{name}: {key}", a, e)
    torch.set_num_threads(2)
    case.check()


# a base, a form, a dtype, options: every kind of work beside the passes too
THREADED: list[tuple[str, str, torch.dtype, dict[str, Any]]] = [
    ("SGD", "step", torch.float64, {"ascent_gradient": "previous"}),
    ("momentum", "evaluations", torch.bfloat16, {"microbatches": 2}),
    ("Adam", "pairs", torch.float32, {"alpha": "adaptive", "max_grad_norm": 1.0}),
    ("AdamW", "step", torch.float32, {"nonfinite": "skip", "adaptive": True}),
    ("Lister", "evaluations", torch.float32, {"alpha": "adaptive"}),
]


def count_threads() -> None:
    """In a process of its own: prints how many threads each warm step has added to it, over 32 tensors of which no op
    of torch needs more than one: at first steps over a little less than 2^19 elements, then over that many.
    """
    steps = []
    torch.set_num_threads(1)
    for each, (base, form, dtype, options) in itertools.product((2**14 - 64, 2**14), THREADED):
        make, settings = TWINS[base]
        params, grad = [nn.Parameter(torch.ones(each).to(dtype)) for _ in range(32)], torch.ones(each).to(dtype)
        optimizer = Lookbehind(params, make, k=3, backend="native", **options, **settings)

        def evaluate(index: int, params: list[nn.Parameter] = params, grad: Tensor = grad) -> Tensor:
            for p in params:
                p.grad = grad
            return grad

        steps.append(partial(drive, optimizer, form, evaluate, 3))
        steps[-1]()
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(2)
    for step in steps:
        step()
        print(len(os.listdir("/proc/self/task")) - before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to count threads")
def test_small_work_stays_on_one_thread() -> None:
    """Below 2^19 elements a step takes no other thread, whatever is in it; from there on it takes both."""
    code = "from tests.kernels.test_native import count_threads as go; go()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"] * len(THREADED) + ["1"] * len(THREADED)


# ---- instruction sets ------------------------------------------------------------------------------------------------


def check_everything(seed: int | None = None) -> None:
    """In a process of its own, on the instruction set that LOOKBEHIND_ISA names: all cases of each dtype, or one of
    each pass that ``seed`` draws. Prints a hash of all results.
    """
    torch.set_num_threads(1)
    found = hashlib.sha256()
    for dtype in DTYPES:
        table = (case for name, rule in VARIANTS for case in cases(dtype, name, rule))
        for case in table if seed is None else (case for _, case in drawn(dtype, SCHEMAS, SIZES, len(SCHEMAS), seed)):
            case.check()
            after = case.run(native)
            for key in WRITTEN[case.name]:
                for tensor in listed_values(after[key]):
                    if tensor is not None:
                        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    check_conversions()
    print(found.hexdigest())


def on_instruction_set(isa: str, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LOOKBEHIND_ISA": isa}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# As torch names the best that a machine has, and as we do: each has all of those before it.
LEVELS = {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}


def test_every_instruction_set() -> None:
    """All passes and all conversions, on each that this machine has; AVX2 and AVX-512 give the same bits, plain x86-64
    has no fused operations.
    """
    here = torch.backends.cpu.get_cpu_capability()
    if here not in LEVELS:
        pytest.skip(f"torch reports {here}")
    seed = None if sample.everything else sample.seed
    code = f"from tests.kernels.test_native import check_everything as go; go({seed})"
    hashes = {}
    for level, isa in LEVELS.items():
        done = on_instruction_set(isa, code)
        assert done.returncode == 0, f"{isa}: {done.stderr}"
        hashes[isa] = done.stdout.strip()
        assert len(hashes[isa]) == 64
        if level == here:
            break
    assert hashes["baseline"] != hashes.get("avx2")
    assert hashes.get("avx512") in (None, hashes.get("avx2"))


def test_an_unknown_instruction_set_is_an_error() -> None:
    code = "from tests.kernels.passes import Case, native; import torch; Case('ascend', torch.float32, [3]).run(native)"
    done = on_instruction_set("sse9", code)
    assert done.returncode != 0
    assert "LOOKBEHIND_ISA: expected baseline, avx2 or avx512" in done.stderr
    assert "got sse9" in done.stderr
    assert on_instruction_set("baseline", code).returncode == 0


# ---- addresses for other devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_locate(dtype: torch.dtype) -> None:
    """Addresses, how many have changed, and gradients that are not as their parameter."""
    params = [torch.zeros(shape, dtype=dtype) for shape in ((3, 4), (5,), (), (2, 0), (2, 3, 4, 5))]
    params.append(params[-1].to(memory_format=torch.channels_last))
    table, grads = tensor_table(params, [0] * 6, [0] * 6), [torch.ones_like(p) for p in params]
    addresses = torch.zeros(6, dtype=torch.int64)
    there = sum(g.data_ptr() != 0 for g in grads)
    for changed in (there, 0):
        assert native.locate(grads, dtype, table, addresses) == changed
        assert addresses.tolist() == [g.data_ptr() for g in grads]
    assert native.locate([grads[0].clone(), *grads[1:]], dtype, table, addresses) == 1
    negated = torch.complex(torch.ones(5), torch.ones(5)).conj().imag
    assert negated.is_neg()
    for place, other in (
        (0, torch.ones(4, 3, dtype=dtype)), (0, torch.ones(4, 3, dtype=dtype).t()), (5, grads[4]), (4, grads[5]),
        (1, torch.ones(5, dtype=torch.int32)), (1, negated), (1, torch.ones(10, dtype=dtype)[::2]),
    ):  # fmt: skip
        odd = [*map(torch.clone, grads)]  # all elsewhere
        odd[place] = other
        before = addresses.clone()
        assert native.locate(odd, dtype, table, addresses) == -1
        assert torch.equal(addresses, before)  # what is uploaded is compared with it
    with pytest.raises(RuntimeError, match="table: expected layouts of 5 tensors"):
        native.locate(grads[:5], dtype, table, addresses)
    with pytest.raises(RuntimeError, match="addresses: expected 6 contiguous int64 on the CPU"):
        native.locate(grads, dtype, table, addresses[:5])


# ---- the ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_schema_table(backend: str) -> None:
    """Each backend has a function for each schema, and takes the schema's arguments and no other."""
    module = BACKENDS[backend]
    assert [*inspect.signature(module.bind).parameters] == ["name", "params", "table", "arguments"]
    for name in SCHEMAS:
        function = getattr(module, name)
        if module is reference:
            assert list(inspect.signature(function).parameters) == ARGUMENTS[name]
        arguments = Case(name, torch.float32, [], "momentum" if name in DESCENTS else "none").copies()
        params, table, _ = arguments.pop("params"), arguments.pop("table"), arguments.pop("grads", None)
        with pytest.raises(TypeError, match=rf"{name}: expected .*flags.*, got 'flag'"):
            module.bind(name, params, table, {**arguments, "flag": 0})
        del arguments["flags"]
        with pytest.raises(TypeError, match=rf"{name}: expected an argument 'flags'"):
            module.bind(name, params, table, arguments)


def test_the_library_implements_the_schemas_and_nothing_else() -> None:
    for name, schema in SCHEMAS.items():
        assert OPS[name]._schema == torch._C.parse_schema(f"lookbehind_fused::{name}{schema}")
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    assert {r for r in registered if r.startswith("lookbehind_fused::")} == {f"lookbehind_fused::{n}" for n in SCHEMAS}


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """What an op says that it writes is what it writes; it works with fake tensors and under AOTAutograd."""
    case = Case(name, dtype, [3, 17, 1], "adam-amsgrad" if name in DESCENTS else "none", Flag.ADAPTIVE)
    torch.library.opcheck(OPS[name], (), case.copies())


@pytest.mark.parametrize("name", SCHEMAS)
def test_version_counters(name: str) -> None:
    """Of all that is written, and of nothing else."""
    case = Case(name, torch.bfloat16, [3, 17, 1], "momentum" if name in DESCENTS else "none")
    arguments = case.copies()

    def versions() -> dict[str, list[int]]:
        return {
            key: [x._version for x in listed_values(value) if isinstance(x, Tensor)] for key, value in arguments.items()
        }

    before = versions()
    getattr(native, name)(**arguments)
    for key, after in versions().items():
        grown = [b > a for a, b in zip(before[key], after, strict=True)]
        assert grown == [key in WRITTEN[name]] * len(grown), key


def test_backward_through_a_tensor_saved_before_the_update_raises() -> None:
    for name in ("ascend", "descend_ascend", "descend_interpolate", "descend_align", "interpolate"):
        arguments = Case(name, torch.float32, [5, 2], "sgd" if name in DESCENTS else "none").copies()
        params = arguments["params"] = [nn.Parameter(p) for p in arguments["params"]]
        loss = sum(p.square().sum() for p in params)
        with torch.no_grad():
            getattr(native, name)(**arguments)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def spoiled(case: Case, key: str, change: Any) -> dict[str, Any]:
    arguments = case.copies()
    arguments[key] = change(arguments[key])
    return arguments


REFUSED = {
    "fewer gradients": ("grads", lambda x: x[:-1]),
    "more gradients": ("grads", lambda x: [*x, x[0]]),
    "fewer params": ("params", lambda x: x[:-1]),
    "no params": ("params", lambda x: []),
    "a short table": ("table", lambda x: x[:-1]),
    "an int32 table": ("table", lambda x: x.int()),
    "a table of other sizes": ("table", lambda x: x + torch.tensor([0, 0, 1, 0])),
    "a table of negative starts": ("table", lambda x: x - torch.tensor([0, 1000, 0, 0])),
    "a table of negative groups": ("table", lambda x: x - torch.tensor([0, 0, 0, 1])),
    "a float64 gradient": ("grads", lambda x: [*x[:-1], x[-1].double()]),
    "bf16 gradients": ("grads", lambda x: [g.bfloat16() for g in x]),
    "a float64 parameter": ("params", lambda x: [*x[:-1], x[-1].double()]),
    "integer parameters": ("params", lambda x: [p.int() for p in x]),
    "a longer gradient": ("grads", lambda x: [*x[:-1], torch.zeros(len(x[-1]) + 1)]),
    "a gradient of another shape": ("grads", lambda x: [*x[:-1], x[-1].view(1, -1)]),
    "a float64 fast": ("fast", lambda x: x.double()),
    "a short fast": ("fast", lambda x: x[:20]),
    "a strided fast": ("fast", lambda x: x.repeat_interleave(2)[::2]),
    "a bf16 fast_from": ("fast_from", lambda x: x.bfloat16()),
    "a short fast_from": ("fast_from", lambda x: x[:20]),
    "a float64 state": ("state", lambda x: [x[0], x[1].double()]),
    "a short state": ("state", lambda x: [x[0], x[1][:20]]),
    "too few states": ("state", lambda x: x[:1]),
    "too many states": ("state", lambda x: [*x, x[0].clone(), x[0].clone()]),
    "too few states to read": ("state_from", lambda x: x[:1]),
    "a short state to read": ("state_from", lambda x: [x[0], x[1][:20]]),
    "integer steps": ("steps", lambda x: x.long()),
    "too few steps": ("steps", lambda x: x[:-1]),
    "too few steps to read": ("steps_from", lambda x: x[:-1]),
    "float32 hyper": ("hyper", lambda x: x.float()),
    "too few numbers in hyper": ("hyper", lambda x: x[:, :-2].contiguous()),
    "too few groups in hyper": ("hyper", lambda x: x[:2]),
    "hyper of one dimension": ("hyper", lambda x: x[0]),
    "strided hyper": ("hyper", lambda x: x[:, :-1]),
    "float32 norms": ("sq_norms", lambda x: x.float()),
    "a row beyond the norms": ("row", lambda x: 2),
    "no rule": ("rule", lambda x: len(RuleId)),
    "a negative rule": ("rule", lambda x: -1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_arguments(what: str) -> None:
    """Named in the error, and nothing is written but the norm, which is of no use to anyone else."""
    key, change = REFUSED[what]
    case = Case("descend_ascend", torch.float32, [3, 40, 5], "adam")
    arguments = spoiled(case, key, change)
    before = {
        k: [x.clone() for x in listed_values(v) if isinstance(x, Tensor)]
        for k, v in arguments.items()
        if k != "sq_norms"
    }
    names = {"params": "params|grads|table", "table": "params|table"}.get(key, key)
    with pytest.raises(RuntimeError, match=rf"\b({names})\b"):
        native.descend_ascend(**arguments)
    for k, tensors in before.items():
        for a, e in zip((x for x in listed_values(arguments[k]) if isinstance(x, Tensor)), tensors, strict=True):
            assert_equal(k, a, e)


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("reduce_sq_norm", "sq_norms", lambda x: x.float()),
        ("reduce_sq_norm", "row", lambda x: -1),
        ("ascend", "slow", lambda x: x[:20]),
        ("ascend", "grads", lambda x: x[:1]),
        ("descend", "grads", lambda x: x[:1]),
        ("descend_interpolate", "slow", lambda x: x.double()),
        ("descend_align", "first", lambda x: x[:20]),
        ("descend_align", "sums", lambda x: x.float()),
        ("descend_align", "sums", lambda x: x[:-1]),
        ("descend_align", "done", lambda x: x.long()),
        ("ascend", "done", lambda x: x[:0]),
        ("interpolate", "sums", lambda x: x.float()),
        ("interpolate", "sums", lambda x: x[:-1]),
        ("interpolate", "params", lambda x: x[:1]),
        ("interpolate", "slow", lambda x: x[:20]),
    ],
)
def test_refused_arguments_of_the_other_passes(name: str, key: str, change: Any) -> None:
    case = Case(name, torch.float32, [3, 40, 5], "momentum" if name in DESCENTS else "none", Flag.PER_TENSOR)
    case.check()
    with pytest.raises(RuntimeError, match=rf"\b{key}\b"):
        getattr(native, name)(**spoiled(case, key, change))


@pytest.mark.parametrize("key", ["perturbed", "slow"])
def test_refused_buffers_of_low_precision(key: str) -> None:
    """They are float32, not of the parameters' dtype."""
    case = Case("ascend", torch.bfloat16, [3, 40, 5])
    with pytest.raises(RuntimeError, match=rf"\b{key}: expected float32"):
        native.ascend(**spoiled(case, key, lambda x: x.bfloat16()))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # older torch says so of every profile
def test_the_profiler_shows_the_passes() -> None:
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, dtype=torch.float64))]

    def step(optimizer: Lookbehind, form: str) -> None:
        def evaluate(_: int) -> Tensor:
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        drive(optimizer, form, evaluate, optimizer.k)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(Lookbehind(params, torch.optim.SGD, lr=0.1, k=3, alpha="adaptive", backend="native"), "step")
        step(Lookbehind(params, torch.optim.SGD, lr=0.1, k=2, alpha=0.5, backend="native"), "pairs")
    seen = {event.key for event in profile.key_averages()}
    assert {f"lookbehind_fused::{name}" for name in SCHEMAS} <= seen


@pytest.mark.parametrize("backend", [native, reference], ids=["native", "reference"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_bound_pass(name: str, backend: Any) -> None:
    """It does again and again what the pass does; what is left out is None, nothing, or -1."""
    rule = "momentum" if name in DESCENTS else "none"
    case = Case(name, torch.float32, [7, 33, 0], rule, listed=False, apart=False, row=-1, seed=1)
    if name == "reduce_sq_norm":
        case.arguments["row"] = 1
    once, twice = (case.by_address(case.copies()) for _ in range(2))
    for _ in range(2):
        getattr(backend, name)(**once)
    left_out = {"row": -1}
    arguments = {key: value for key, value in twice.items() if value is not None and value != left_out.get(key, [])}
    params, table, grads = arguments.pop("params"), arguments.pop("table"), arguments.pop("grads", ())
    run = backend.bind(name, params, table, arguments)
    for _ in range(2):
        run(grads)
    for key in WRITTEN[name]:
        for a, e in zip(listed_values(twice[key]), listed_values(once[key]), strict=True):
            assert_equal(key, a, e) if isinstance(a, Tensor) else None


def test_a_bound_pass_follows_a_parameter_that_moves() -> None:
    """Whoever moves it writes its address into the table."""
    case = Case("ascend", torch.float32, [7, 33], listed=False)
    expected, arguments = case.run(reference, torch.float64), case.by_address(case.copies())
    params, table, grads = arguments.pop("params"), arguments.pop("table"), arguments.pop("grads")
    run = native.bind("ascend", params, table, arguments)
    with torch.no_grad():
        for p in params:
            p.data = p.clone()
    table[:, Column.ADDRESS] = torch.tensor([p.data_ptr() for p in params])
    run(grads)
    case.check_written({**arguments, "params": params}, expected)


@pytest.mark.parametrize("name", ["ascend", "descend_ascend"])
def test_gradients_of_another_dtype_by_address(name: str) -> None:
    """The op itself would take the parameters for what the gradients are."""
    case = Case(name, torch.float32, [7, 33], "sgd" if name in DESCENTS else "none", listed=False)
    arguments = case.by_address(case.copies())
    before = [p.clone() for p in arguments["params"]]
    arguments["grads"] = [g.half() for g in arguments["grads"]]
    with pytest.raises(RuntimeError, match=r"grads: expected torch.float32 as the parameters have, got torch.float16"):
        getattr(native, name)(**arguments)
    assert all(map(torch.equal, arguments["params"], before))


def test_a_pass_by_address_is_told_the_dtype() -> None:
    """``interpolate`` has no gradients to tell it from."""
    case = Case("interpolate", torch.float32, [3])
    arguments = {**case.by_address(case.copies()), "params": [], "dtype": None}
    with pytest.raises(RuntimeError, match="dtype: expected one, since there are no params"):
        OPS["interpolate"](**arguments)
    with pytest.raises(RuntimeError, match="dtype: expected float64, float32, bfloat16 or float16"):
        OPS["interpolate"](**{**arguments, "dtype": torch.int32})


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(24)
@pytest.mark.parametrize("backend", [native, reference], ids=["native", "reference"])
@pytest.mark.parametrize(("name", "rule"), [(n, r) for n, r in VARIANTS if n != "interpolate"])
def test_each_tensor_takes_the_row_of_its_group(name: str, rule: str, backend: Any) -> None:
    """What a call makes of two groups is what two calls make of one group each, its numbers being the only row."""
    case = Case(name, torch.float64, SIZES, rule, Flag.ADAPTIVE | Flag.PER_TENSOR, row=1 if name[0] == "r" else -1)
    together, apart = case.run(backend), case.copies()
    squares = torch.zeros(2, dtype=torch.float64)
    for group in (0, 2):
        rows = (apart["table"][:, Column.GROUP] == group).nonzero().flatten().tolist()
        table = apart["table"][rows]
        table[:, Column.GROUP] = 0
        lists = {key: [apart[key][row] for row in rows] for key in ("params", "grads")}
        getattr(backend, name)(**{**apart, **lists, "table": table, "hyper": apart["hyper"][group : group + 1]})
        squares += apart["sq_norms"][1]
    if name == "reduce_sq_norm":
        apart["sq_norms"][1] = squares
    for key in WRITTEN[name]:
        for a, e in zip(listed_values(together[key]), listed_values(apart[key]), strict=True):
            if key == "sq_norms":
                assert_close(key, a, e, 1e-15)
            elif a is not None:
                assert_equal(key, a, e)


# ---- without the library ---------------------------------------------------------------------------------------------

WITHOUT = """
import warnings
import torch
import lookbehind_fused
from lookbehind_fused import Lookbehind
from lookbehind_fused.kernels import native

assert lookbehind_fused.__file__.startswith({folder!r}), lookbehind_fused.__file__
p = torch.nn.Parameter(torch.ones(3))

def closure():
    loss = p.square().sum()
    loss.backward()
    return loss

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        optimizer = Lookbehind([p], torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer.step(closure)
        optimizer.step(closure)
    Lookbehind([p], torch.optim.SGD, lr=0.1, backend="reference").step(closure)
assert not torch.equal(p.detach(), torch.ones(3))
messages = [str(w.message) for w in caught]
assert len(messages) == 1, messages
try:
    Lookbehind([p], torch.optim.SGD, lr=0.1, backend="native")
except RuntimeError as error:
    messages.append(str(error))
print("\\n".join(messages))
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("content", "reason"), [(None, "was not built"), (b"no library", "does not load with torch")], ids=["no", "broken"]
)
def test_without_a_library(tmp_path: Path, content: bytes | None, reason: str) -> None:
    """The package imports; "auto" takes the reference and says so once; "native" is refused, with reason and remedy."""
    package = shutil.copytree(
        ROOT / "lookbehind_fused", tmp_path / "lookbehind_fused", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if content is not None:
        (package / "_native.abi3.so").write_bytes(content)
    command = [sys.executable, "-c", WITHOUT.format(folder=str(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warned, refused = done.stdout.splitlines()
    assert "'auto' uses the slower 'reference'" in warned
    assert "backend: 'native' is not available" in refused
    for message in (warned, refused):
        assert reason in message
        assert "g++" in message
        assert "--no-build-isolation" in message
