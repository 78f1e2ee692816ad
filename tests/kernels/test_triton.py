"""The Triton kernels without a GPU: interpreted, compiled ahead of time, and executed as compiled.

``gpusim`` does the last two; where it is not on PYTHONPATH these tests are skipped. Every part runs in a process of its
own (``tests.kernels.triton_cases``).
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench import traffic
from lookbehind_fused import Lookbehind
from lookbehind_fused.kernels import SCHEMAS, Flag, RuleId, cuda, device, native, triton
from lookbehind_fused.kernels.contract import Column
from lookbehind_fused.kernels.schema import ARGUMENTS
from tests.kernels.machine_code import disassembled, loads_under_way
from tests.kernels.mutants import MISSING, ROOT, assert_noticed, assert_passed, cases_of, copied_to, mutate
from tests.kernels.passes import DESCENTS, Case
from tests.sampling import fewer, sample

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} on PYTHONPATH")


def run(module: str, *arguments: str, **environment: str) -> str:
    """What a module printed; it must have ended well."""
    command = [sys.executable, "-m", module, *arguments]
    process = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=process, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# every how manieth case of the table: all of them take a quarter of an hour (CONTRIBUTING). A sample of it is drawn.
INTERPRETED = [
    ("float32", "reduce_sq_norm,ascend,interpolate", 1),
    *(("float32", name, 4) for name in DESCENTS),
    *((dtype, "", 19) for dtype in ("bfloat16", "float16", "float64")),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("dtype", "passes", "every"), INTERPRETED)
def test_the_table_in_the_interpreter(dtype: str, passes: str, every: int) -> None:
    """Each pass against the reference in float64, as native is tested; bfloat16 rounded as on a GPU."""
    options = ["--passes", passes, "--sample", str(every)] if sample.everything else fewer(9)
    printed = run("tests.kernels.triton_cases", "interpreter", "--dtype", dtype, *options)
    assert re.search(r"^[1-9]\d* cases, 0 failed$", printed, re.MULTILINE)


# In 16 bits ``ascend`` is compiled to sums of a bfloat16 and a float32 where the GPU has them, which gpusim has not.
WITHOUT_ASCEND = ",".join(name for name in SCHEMAS if name != "ascend")
EXECUTED = [
    ("sm90", "float32", "reduce_sq_norm,ascend,interpolate", 1),
    *(("sm90", "float32", name, 8) for name in DESCENTS),
    ("sm80", "float32", "", 23),
    ("sm100", "float32", "", 19),
    ("sm80", "bfloat16", "", 43),
    ("sm90", "float16", "", 41),
    ("sm100", "bfloat16", WITHOUT_ASCEND, 40),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("where", "dtype", "passes", "every"), EXECUTED)
def test_the_table_on_executed_code(where: str, dtype: str, passes: str, every: int) -> None:
    """The compiled kernels: every address, every barrier, no two blocks at one element, gradients read-only."""
    options = ["--passes", passes, "--sample", str(every)]
    if not sample.everything:
        options = ["--passes", passes if passes == WITHOUT_ASCEND else "", *fewer(7)]
    printed = run("tests.kernels.triton_cases", where, "--dtype", dtype, *options)
    assert re.search(r"^[1-9]\d* cases, 0 failed$", printed, re.MULTILINE)


@pytest.mark.parametrize(("tensors", "every"), [(1, 29), pytest.param(300, 122, marks=pytest.mark.slow)])
def test_few_and_many_tensors_on_executed_code(tensors: int, every: int) -> None:
    """Every even case: in random schedules, those of odd numbers, 300 tensors take minutes."""
    options = ["--sample", str(every)] if sample.everything else fewer(4)
    printed = run("tests.kernels.triton_cases", "sm90", "--tensors", str(tensors), *options)
    assert re.search(r"^[1-9]\d* cases, 0 failed$", printed, re.MULTILINE)


def interpreted(*arguments: str) -> str:
    """What pytest prints that runs on this backend alone, in the interpreter."""
    environment = {"TRITON_INTERPRET": "1", "LOOKBEHIND_TEST_BACKENDS": "triton"}
    options = ["--all"] if sample.everything else fewer(1)
    return run("pytest", "-p", "no:xdist", *options, *arguments, **environment)


def test_whole_steps_in_the_interpreter() -> None:
    """The optimizer on this backend against the transcription of Algorithm 1, to 1e-12 in float64."""
    chosen = "switched_off or settings_may_change or (groups_with_settings and -2-)"
    assert "[100%]" in interpreted("tests/test_algorithm1.py", "-k", chosen)


def test_the_family_in_the_interpreter() -> None:
    """Each method against its transcription, to 1e-12 in float64, with SGD as the base."""
    chosen = "float64 and ((transcription and step and (sgd or asam)) or lookahead_is_its_transcription)"
    assert "[100%]" in interpreted("tests/test_family.py", "tests/parts/test_lookahead.py", "-k", chosen)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("where", "every"), [("sm90", 23), ("sm100", 41)])
def test_whole_steps_on_executed_code(where: str, every: int) -> None:
    """The optimizer on compiled kernels: SGD, Nesterov, Adam, AdamW; k, alpha, ASAM and clipping in turn."""
    options = ["--sample", str(every)] if sample.everything else fewer(2)
    printed = run("tests.kernels.triton_cases", where, "--steps", *options)
    assert re.search(r"^[1-9]\d* cases, 0 failed$", printed, re.MULTILINE)


def test_more_programs_than_fit_32_bits() -> None:
    """A tensor of 3e9 elements: its last chunk is where it should be. Nothing has that much memory here, so a kernel
    with a small tensor's addresses shifted back by the chunk's offset finds its way to that tensor.
    """
    printed = run("tests.kernels.triton_cases", "sm90", "--far")
    assert "the last chunk of 3,000,000,001 elements is at its place" in printed


# what: before, after, where it is run, on which passes
MUTANTS = {
    "no mask on stores": (
        "        tl.store(pointers, values, mask=here)",
        "        tl.store(pointers, values)",
        *("sm90", "ascend"),
    ),
    "no tail": (
        "begin, start, split, count, factor, eta, moves, P, T, ADAPTS, SKIPS, False",
        "begin, start, split, split, factor, eta, moves, P, T, ADAPTS, SKIPS, False",
        *("interpreter", "ascend"),
    ),
    "every address taken for aligned": (
        "tl.where(((address | other) & 15) == 0, count // BLOCK * BLOCK, 0)",
        "count // BLOCK * BLOCK",
        *("sm90", "ascend"),
    ),
    "two buffers swapped": (
        "    b0, b1, b2 = buffers\n",
        "    b1, b0, b2 = buffers\n",
        *("interpreter", "descend"),
    ),
    "offsets of 32 bits": (
        "return tensor, row, group, number, number * LENGTH,",
        "return tensor, row, group, number, (number.to(tl.int32) * LENGTH).to(tl.int64),",
        *("sm90", "--far"),
    ),
    "a counter not put back": (
        "        tl.store(counter, 0)\n",
        "        tl.store(counter, 1)\n",
        *("sm90", "reduce_sq_norm"),
    ),
    "the last chunk for the last program": (
        "    if _is_last(counters + 1 + tensor, count):",
        "    if number == count - 1:",
        *("sm90", "reduce_sq_norm"),
    ),
    "an infinite sum of squares is taken as it is": (
        '(scaled == float("inf")) | (plain == float("inf"))',
        "(scaled < 0.0)",
        *("sm90", "reduce_sq_norm"),
    ),
    "every chunk counts the update, in place": (
        "    if number == 0:\n        if SKIPS and (INTERPOLATES or ALIGNS):\n"
        "            tl.store(steps + row, step, mask=moves)\n"
        "        else:\n            tl.store(steps",
        "    if number >= 0:\n        if SKIPS and (INTERPOLATES or ALIGNS):\n"
        "            tl.store(steps + row, step, mask=moves)\n"
        "        else:\n            tl.store(steps_from",
        *("sm90", "descend"),
    ),
}


def options_of(where: str, what: str) -> list[str]:
    """Of ``tests.kernels.triton_cases``."""
    sample = "12" if what == "descend" else "1"  # the first rules have no state
    return [where, what] if what == "--far" else [where, "--passes", what, "--sample", sample, "--most", "9"]


@pytest.mark.slow
def test_what_is_no_mutant_passes(tmp_path: Path) -> None:
    """The cases below fail because of the mutation and of nothing else."""
    folder = copied_to(tmp_path, "lookbehind_fused", "tests", "benchmarks")
    for where, what in {(where, what) for _, _, where, what in MUTANTS.values()}:
        assert_passed(cases_of(folder, "tests.kernels.triton_cases", options_of(where, what)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_seen(mutant: str, tmp_path: Path) -> None:
    """The table of passes notices each of these in the kernels."""
    before, after, where, what = MUTANTS[mutant]
    folder = copied_to(tmp_path, "lookbehind_fused", "tests", "benchmarks")
    mutate(folder / "lookbehind_fused" / "kernels" / "triton_kernels.py", before, after)
    assert_noticed(cases_of(folder, "tests.kernels.triton_cases", options_of(where, what)))


# ---- traffic ---------------------------------------------------------------------------------------------------------


def test_traffic_is_what_design_allows_or_less() -> None:
    """Bytes of each array, counted from the executed code, in whole chunks of float32."""
    chosen = sample(list(traffic.STEPS), 3, "traffic")
    code = (
        f"titles = {chosen}"
        + """
from gpusim import simdriver
from benchmarks.bench import traffic
from benchmarks.bench.bounds import bytes_per_parameter
driver = simdriver.activate(90)
for title in titles:
    base, options, settings = traffic.STEPS[title]
    found = traffic.launches(base, options, settings, driver)
    print(title, sum(launch.bytes for launch in found), bytes_per_parameter(settings))
    for launch in found:
        assert launch.stack == 0 and launch.registers <= 64
        assert {*launch.read.values(), *launch.written.values()} == {4.0}, launch
        assert launch.wide * 16 == launch.bytes * traffic.SIZE, launch  # all accesses are wide
"""
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert [title for title, *_ in rows] == chosen
    for title, moved, allowed in rows:
        if title.startswith("SGD"):
            assert float(moved) == float(allowed), title


# ---- the backend -----------------------------------------------------------------------------------------------------


def test_cpu_tensors_are_refused() -> None:
    """Where there is neither a GPU nor the interpreter, by name and with what is there."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Lookbehind([p], torch.optim.SGD, lr=0.1, backend="triton")
    refused = "backend: expected one with kernels for tensors on cpu, got 'triton', which is for GPUs"
    with pytest.raises(ValueError, match=refused):
        optimizer.step(lambda: p.square().sum().backward())
    assert torch.equal(p.detach(), torch.ones(3))
    assert p.grad is None


# ---- the ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "namespace"), [(triton, "lookbehind_fused_triton"), (cuda, "lookbehind_fused")], ids=["triton", "cuda"]
)
def test_the_compiler_takes_the_ops_as_they_are(backend: Any, namespace: str) -> None:
    """Fake CUDA tensors, one graph without a break, each pass a call of its own in it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = {"device": "cuda", "dtype": torch.float32}
        p, g, slow, state = (torch.empty(100, **on_gpu) for _ in range(4))
        norms = torch.empty(1, 2, dtype=torch.float64, device="cuda")
        hyper = torch.empty(1, 9, dtype=torch.float64, device="cuda")
        done = torch.empty(1, dtype=torch.int32, device="cuda")
        steps, table = torch.empty(1, **on_gpu), torch.empty(1, 7, dtype=torch.int64)

        @torch.compile(fullgraph=True, backend=kept)
        def step() -> None:
            common = {"params": [p], "grads": [g], "table": table, "hyper": hyper, "flags": 0}
            backend.ascend(**common, slow=slow, sq_norms=norms, row=0, done=done)
            backend.descend_interpolate(
                **common, slow=slow, fast=slow, state=[state], steps=steps, rule=int(RuleId.MOMENTUM), done=done
            )

        step()
    torch._dynamo.reset()
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "lookbehind_fused" in name] == [
        f"{namespace}.ascend.default",
        f"{namespace}.descend_interpolate.default",
    ]


def test_nothing_is_uploaded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once warm, a pass over tensors that have stayed where they are allocates nothing and copies nothing to the
    device: what a captured CUDA graph needs.
    """
    from lookbehind_fused.kernels import ops, triton_kernels

    uploads: list[int] = []
    monkeypatch.setattr(device.Plan, "_upload", lambda self, values, to: (uploads.append(1), to.copy_(values)))
    arguments = Case("descend_ascend", torch.float32, [5000, 3], "adam", row=0).copies()
    params, grads, table = (arguments.pop(name) for name in ("params", "grads", "table"))
    layouts = torch.tensor([[0, 5000, 1], [0, 3, 1]])  # addresses, sizes, strides, as buckets have them
    table = torch.cat([table, layouts], 1)
    for name in SCHEMAS:
        monkeypatch.setattr(triton_kernels, name, Launched(getattr(triton_kernels, name)))
    run = triton.bind("descend_ascend", params, table, arguments)
    run(grads)
    assert len(uploads) == 2  # where the tensors are, and their gradients

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.is_view or func is native.locate, f"{func} in a warm pass"
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(ops, "is_in_torch_dispatch_mode", lambda: False)  # the mode is to see what a pass does
    with Seen():
        run(grads)
    assert len(uploads) == 2
    grads[0] = grads[0].clone()
    run(grads)
    assert len(uploads) == 3
    table[:, Column.ADDRESS] = 0  # whoever moves a parameter writes into the table
    run(grads)
    assert len(uploads) == 4
    values = [
        {**arguments, "params": params, "grads": grads, "table": table}[name] for name in ARGUMENTS["descend_ascend"]
    ]
    for expected in (6, 6):  # the op finds its plan by the table
        torch.ops.lookbehind_fused_triton.descend_ascend.default(*values)
        assert len(uploads) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 1},
        {"k": 2},
        {"k": 3, "alpha": "adaptive"},
        {"k": 3, "alpha": "adaptive", "alpha_scope": "tensor"},
        {"k": 2, "max_grad_norm": 1.0, "adaptive": True},
        {"k": 2, "nonfinite": "skip", "loss_scale": 8.0},
        {"k": 2, "reuse_gradient": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_warm_step_is_nothing_but_launches(
    monkeypatch: pytest.MonkeyPatch, base: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    """A whole step over gradients that stay where they are: no allocation, no upload, nothing read by the host. What
    there is beside the launches are views, the note of what is done set back once, for k = 1 a copy of the update
    counts, and where steps may be undone a sum of the norms. So a CUDA graph can hold it. Two groups are one bucket.
    """
    from lookbehind_fused import open_step
    from lookbehind_fused.kernels import ops, triton_kernels

    monkeypatch.setattr(open_step, "on_host", lambda *_: False)
    uploads: list[int] = []
    monkeypatch.setattr(device.Plan, "_upload", lambda self, values, to: (uploads.append(1), to.copy_(values)))
    monkeypatch.setattr(triton, "serves", lambda device: True)
    monkeypatch.setattr(ops, "is_in_torch_dispatch_mode", lambda: False)  # the mode below is to see what an op does
    launches: list[str] = []
    for name in SCHEMAS:
        kernel = Launched(getattr(triton_kernels, name), lambda name=name: launches.append(name))
        monkeypatch.setattr(triton_kernels, name, kernel)
    params = [torch.randn(n).requires_grad_() for n in (5000, 3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "rho": 0.1}]
    grads = [torch.randn(p.shape) for p in params]
    optimizer = Lookbehind(groups, base, lr=0.1, weight_decay=0.1, backend="triton", **settings)

    def step() -> None:
        for _ in optimizer.evaluations():
            for p, g in zip(params, grads, strict=True):
                p.grad = g

    step()
    step()
    uploads.clear()
    launches.clear()
    seen: list[str] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view and func is not native.locate:
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        step()
    assert uploads == []
    verdict = ["aten.sum.IntList_out", "aten.add_.Tensor"] if settings.get("nonfinite") else []
    assert seen == ["aten.zero_.default", *["aten.copy_.default"] * (settings["k"] == 1), *verdict]
    evaluations = 2 * settings["k"] if not settings.get("reuse_gradient", True) else settings["k"] + 1
    assert 0 < len(launches) <= 2 * evaluations


class Launched:
    """In the place of a kernel: a launch that computes nothing and calls ``noted``."""

    def __init__(self, kernel: Any, noted: Callable[[], None] = lambda: None) -> None:
        self.arg_names, self.noted = kernel.arg_names, noted

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.noted()


# ---- ahead of time ---------------------------------------------------------------------------------------------------

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def launches(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Kernel and arguments of every launch that a case makes; nothing is run."""
    found = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name, self.arg_names = name, getattr(triton_kernels, name).arg_names

        def __getitem__(self, grid: Any) -> Any:
            return lambda **arguments: found.append((self.name, arguments))

    from lookbehind_fused.kernels import triton_kernels

    with monkeypatch.context() as patch:
        for name in SCHEMAS:
            patch.setattr(triton_kernels, name, Recorded(name))
        case.run(triton)
    assert found
    return found


def compiled(name: str, arguments: dict[str, Any], target: Any) -> Any:
    """A launch's kernel, compiled for a GPU as the launch would have it compiled."""
    from gpusim.aot import aot

    from lookbehind_fused.kernels import triton_kernels

    kernel, signature, constants, aligned = getattr(triton_kernels, name), {}, {}, []
    for argument in kernel.arg_names:
        value = arguments[argument]
        if isinstance(value, Tensor):
            signature[argument] = POINTERS[value.dtype]
            aligned.append(argument)
        elif argument in triton_kernels.COUNTS:
            signature[argument] = "i32"
        else:
            signature[argument], constants[argument] = "constexpr", value
    options = triton_kernels.options(target.warp_size if hasattr(target, "warp_size") else 32)
    return aot(kernel, signature, constants, target, aligned, **options)


# pass, rule, flags, how many full-size arrays it reads and writes
FULL = [
    ("reduce_sq_norm", "none", 0, 1, 0),
    ("reduce_sq_norm", "none", Flag.ADAPTIVE, 2, 0),
    ("ascend", "none", 0, 2, 2),
    ("ascend", "none", Flag.ADAPTIVE, 2, 2),
    ("descend", "momentum", 0, 3, 2),
    ("descend", "adam-amsgrad", 0, 5, 4),
    ("descend_ascend", "momentum", 0, 4, 3),
    ("descend_ascend", "momentum", Flag.DERIVES, 4, 3),
    ("descend_ascend", "nesterov", Flag.ADAPTIVE, 4, 3),
    ("descend_ascend", "adamw", Flag.ADAPTIVE, 5, 4),
    ("descend_ascend", "adam-amsgrad", Flag.ADAPTIVE, 6, 5),
    ("descend_ascend", "adam-amsgrad", Flag.ADAPTIVE | Flag.DERIVES, 6, 5),
    ("descend_interpolate", "sgd", 0, 3, 1),
    ("descend_interpolate", "momentum", 0, 4, 2),
    ("descend_interpolate", "momentum", Flag.DERIVES, 3, 2),
    ("descend_interpolate", "adam-amsgrad", 0, 6, 4),
    ("descend_align", "momentum", 0, 5, 2),
    ("descend_align", "momentum", Flag.DERIVES, 3, 2),
    ("descend_align", "adam-amsgrad", Flag.PER_TENSOR, 7, 4),
    ("descend_align", "adam-amsgrad", Flag.DERIVES, 5, 4),
    ("interpolate", "none", 0, 2, 1),
]


def full_case(name: str, rule: str, flags: int, dtype: torch.dtype, size: int = 8192) -> Case:
    unkept = name == "descend_align" and bool(flags & Flag.DERIVES)
    return Case(name, dtype, [(size,)], rule, flags, unkept=unkept, row=-1 if name != "reduce_sq_norm" else 0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_registers_spills_and_wide_accesses(
    capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At most 64 registers, no stack, 16-byte accesses of every full-size array (8 of 16-bit ones), little shared
    memory, and in float32 a load of each of these arrays before the first use or store.
    """
    from gpusim.aot import resources, vector_accesses

    for name, rule, flags, reads, writes in sample(FULL, 5):
        ((launched, arguments),) = launches(full_case(name, rule, flags, dtype), monkeypatch)
        kernel = compiled(launched, arguments, capability)
        what = f"{name} {rule} {flags}"
        used = resources(kernel.asm["cubin"])
        assert used["reg"] <= 64, f"{what}: {used}"
        assert used["stack"] == 0, f"{what}: {used}"
        assert kernel.metadata.shared < 4096, what
        found = vector_accesses(kernel.asm["ptx"])
        wide = {kind: sum(found.get(f"{kind}.global.v{n}.b32", 0) for n in (2, 4)) for kind in ("ld", "st")}
        if dtype == torch.float32:
            wide = {kind: found.get(f"{kind}.global.v4.b32", 0) for kind in ("ld", "st")}
            # an unrolled loop has each of them several times
            assert (wide["ld"], wide["st"]) == (wide["ld"] // reads * reads, wide["ld"] // reads * writes), (
                f"{what}: {found}"
            )
        assert wide["ld"] >= reads, f"{what}: {found}"
        assert wide["st"] >= writes, f"{what}: {found}"
        if dtype == torch.float32:  # else there are accesses as narrow as those of the tables
            cubin = tmp_path / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            (code,) = disassembled(cubin).values()
            assert loads_under_way(code) >= reads, what


def test_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx942: the same, in its own words."""
    from triton.backends.compiler import GPUTarget

    for name, rule, flags, reads, writes in sample(FULL, 5):
        ((launched, arguments),) = launches(full_case(name, rule, flags, torch.float32), monkeypatch)
        kernel = compiled(launched, arguments, GPUTarget("hip", "gfx942", 64))
        what, code = f"{name} {rule} {flags}", kernel.asm["amdgcn"]
        used = dict(
            re.findall(r"\.(vgpr_count|sgpr_spill_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", code)
        )
        assert int(used.pop("vgpr_count")) <= 64, what
        assert set(used.values()) == {"0"}, f"{what}: {used}"
        assert kernel.metadata.shared < 4096, what
        assert len(re.findall(r"(?:buffer|global)_load_dwordx4", code)) >= reads, what
        assert len(re.findall(r"(?:buffer|global)_store_dwordx4", code)) >= writes, what
