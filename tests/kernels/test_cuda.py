"""The CUDA kernels without a GPU: compiled by nvcc, looked at, and executed as compiled.

``gpusim`` executes them; where it is not on PYTHONPATH, or there is no nvcc, these tests are skipped. What is executed
runs in a process of its own (``tests.kernels.cuda_cases``).
"""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.bench.host import launches_do_nothing
from lookbehind_fused import Lookbehind
from lookbehind_fused.kernels import SCHEMAS, cuda, device, native, reference, resolve, triton
from lookbehind_fused.kernels.contract import INLINED
from tests.kernels.cuda_build import CAPABILITIES, Build, missing
from tests.kernels.machine_code import disassembled, loads_under_way
from tests.kernels.mutants import ROOT, assert_noticed, assert_passed, cases_of, copied_to, mutate
from tests.kernels.passes import Case
from tests.kernels.test_triton import run
from tests.sampling import fewer, sample

needs_tools = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")

# A sample compiles nothing but what it runs.
ALONE = [] if sample.everything else ["--alone"]

# every how manieth case of the table: all of them take half an hour (CONTRIBUTING). A sample of it is drawn.
EXECUTED = [("sm90", "float32", 23), ("sm80", "bfloat16", 61), ("sm100", "float16", 59), ("sm100", "float64", 67)]


@needs_tools
@pytest.mark.sample(1)
@pytest.mark.parametrize(("where", "dtype", "every"), EXECUTED)
def test_the_table_on_executed_code(where: str, dtype: str, every: int) -> None:
    """Each pass against the reference in float64, through the ops and their checks: every address, every barrier, no
    two blocks at one element, gradients read-only.
    """
    options = ["--sample", str(every)] if sample.everything else fewer(7)
    printed = run("tests.kernels.cuda_cases", where, "--dtype", dtype, *ALONE, *options)
    assert re.search(r"^[1-9]\d* cases, 0 failed$", printed, re.MULTILINE)


@needs_tools
@pytest.mark.sample(2)
@pytest.mark.parametrize("instead", ["--many", "--bytes", "--refused"])
def test_what_is_not_in_the_table(instead: str) -> None:
    """1 to 441 tensors and 257 chunks; bytes of each array; arguments that are refused."""
    options = [] if sample.everything else fewer(5)
    printed = run("tests.kernels.cuda_cases", "sm90", instead, *ALONE, *options)
    assert re.search(r"^[1-9]\d* cases, 0 failed$", printed, re.MULTILINE)


@needs_tools
def test_whole_steps_on_executed_code() -> None:
    """The optimizer on compiled kernels: base optimizers, k, alpha, ASAM and clipping in turn."""
    options = ["sm80", "--sample", "37"] if sample.everything else ["sm90", *fewer(2)]
    printed = run("tests.kernels.cuda_cases", "--steps", *ALONE, *options)
    assert re.search(r"^[1-9]\d* cases, 0 failed$", printed, re.MULTILINE)


@needs_tools
def test_more_programs_than_fit_32_bits() -> None:
    """A tensor of 3e9 elements: its last chunk is where it should be."""
    printed = run("tests.kernels.cuda_cases", "sm90", "--far", *ALONE)
    assert "the last chunk of 3,000,000,001 elements is at its place" in printed


# what: the file, before, after, with which options it is run
MUTANTS = {
    "no barrier between the sums of the warps": (
        "sums.cuh",
        "  __syncthreads();\n  for (int t = 0; t < kTerms; ++t) {\n    x[t] = 0;",
        "  for (int t = 0; t < kTerms; ++t) {\n    x[t] = 0;",
        "--passes reduce_sq_norm",
    ),
    "an infinite sum of squares is taken as it is": (
        "kernels.cuh",
        "if (isinf(sums[0]) || isinf(sums[1]))",
        "if (sums[0] < 0)",
        "--passes reduce_sq_norm",
    ),
    "no tail": ("memory.cuh", "i < chunk.count; i += kThreads", "i < chunk.wide; i += kThreads", "--passes ascend"),
    "every address taken for aligned": (
        "memory.cuh",
        "((address | gradient | start * int64_t(sizeof(T))) & 15) == 0",
        "count > 0",
        "--passes ascend",
    ),
    "two buffers swapped": (
        "kernels.cuh",
        "chunk.in(a.state_from[s], i));\n    if (kAscends &&",
        "chunk.in(a.state_from[kStates - 1 - s], i));\n    if (kAscends &&",
        "--passes descend --sample 37",
    ),
    "a counter not put back": ("sums.cuh", "if (last) *counter = 0;", "", "--passes reduce_sq_norm"),
    "the last chunk for the last block": (
        "sums.cuh",
        "if (!is_last(a.counters + 1 + chunk.tensor, blocks)) return;",
        "if (chunk.number + 1 < blocks) return;",
        "--passes descend_align",
    ),
    "offsets of 32 bits": (
        "memory.cuh",
        "int64_t(number) * kLength",
        "int64_t(int32_t(uint32_t(number) * kLength))",
        "--far",
    ),
    "one norm alone decides whether a step is skipped": (
        "../numbers.h",
        "scaled - scaled == 0 && plain - plain == 0",
        "scaled - scaled == 0",
        "--passes ascend --sample 3",
    ),
    "the gradient's scale is left out": ("kernels.cuh", "update(w, g * scale, state)", "update(w, g, state)",
                                         "--passes descend --sample 37"),
    "an op leaves out a buffer": ("ops.cpp", 'a.first = launch.buffer("first", first);', "",
                                  "--passes descend_align --sample 23"),
}  # fmt: skip


def options_of(options: str) -> list[str]:
    """Of ``tests.kernels.cuda_cases``."""
    return ["sm90", "--alone", "--most", "6", *options.split()]


@needs_tools
@pytest.mark.slow
def test_what_is_no_mutant_passes(tmp_path: Path) -> None:
    """The cases below fail because of the mutation and of nothing else."""
    folder = copied_to(tmp_path, "csrc", "lookbehind_fused", "tests", "benchmarks")
    for options in {options for *_, options in MUTANTS.values()}:
        assert_passed(cases_of(folder, "tests.kernels.cuda_cases", options_of(options)))


@needs_tools
@pytest.mark.sample(1)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_seen(mutant: str, tmp_path: Path) -> None:
    """The table of passes notices each of these in the kernels and their ops."""
    name, before, after, options = MUTANTS[mutant]
    folder = copied_to(tmp_path, "csrc", "lookbehind_fused", "tests", "benchmarks")
    mutate(folder / "csrc" / "cuda" / name, before, after)
    assert_noticed(cases_of(folder, "tests.kernels.cuda_cases", options_of(options)))


# ---- machine code ----------------------------------------------------------------------------------------------------


# Of each pass and rule: the arrays that a thread reads whatever it is given (of the base optimizer's own steps the fast
# weights alone), and how many runs of each before it uses the first.
READ = {
    "reduce_sq_norm": {"": (1, 4)},
    "ascend": {"": (2, 4)},
    "descend": {"none": (1, 4), "sgd": (2, 4), "momentum": (3, 2), "adam": (4, 2), "amsgrad": (5, 2)},
    "descend_ascend": {"none": (3, 2), "sgd": (3, 2), "momentum": (4, 2), "adam": (5, 2), "amsgrad": (6, 1)},
    "descend_interpolate": {"none": (1, 2), "sgd": (2, 2), "momentum": (3, 2), "adam": (4, 1), "amsgrad": (5, 1)},
    "descend_align": {"none": (1, 2), "sgd": (2, 2), "momentum": (3, 1), "adam": (4, 1), "amsgrad": (5, 1)},
    "interpolate": {"": (2, 4)},
}
RULES = {"NoRuleI": "none", "SgdI.Li0": "sgd", "SgdI.Li1": "momentum", "AdamI.Li0": "adam", "AdamI.Li1": "amsgrad"}


def pass_and_rule(kernel: str) -> tuple[str, str]:
    """By the kernel's name in machine code; the rule is "" where the pass has none."""
    header = (ROOT / "csrc" / "cpu" / "chunk.h").read_text()
    passes = re.findall(r"\w+", re.search(r"enum class Pass {(.*?)}", header, re.DOTALL)[1])
    number = re.search(r"PassE(\d)", kernel)
    if number:
        return passes[int(number[1])], next(rule for pattern, rule in RULES.items() if re.search(pattern, kernel))
    return next(name for name in ("reduce_sq_norm", "ascend", "interpolate") if name in kernel), ""


@needs_tools
@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_spills_and_wide_accesses(capability: int, dtype: str, tmp_path: Path) -> None:
    """At most 64 registers (128 in double), no stack, little shared memory, no access of 16 bytes of the PTX that the
    machine code takes apart, and as many loads before the first use or store as there are to be.
    """
    build = Build() if sample.everything else Build([dtype], [capability])
    cubin = tmp_path / "kernels.cubin"
    cubin.write_bytes(build.cubin(dtype, capability))
    used = build.resources(dtype, capability)
    assert len(used) == 3 + 4 * 5  # reduce_sq_norm, ascend, interpolate; each descent for each rule
    for name, of_kernel in used.items():
        assert of_kernel["reg"] <= (128 if dtype == "float64" else 64), name
        assert of_kernel["stack"] == 0, name
        assert of_kernel["shared"] < 4096, name
    code = disassembled(cubin)
    ptx = build.ptx(dtype, capability)
    for name in used:
        kernel = ptx[ptx.index(f".entry {name}(") :]
        kernel = kernel[: kernel.index("\n}\n")]
        for load_or_store, machine in (("ld", "LDG"), ("st", "STG")):
            wide = re.findall(rf"{load_or_store}\.global\.(?:wb\.)?(?:v4\.[uf]32|v2\.f64)", kernel)
            assert len(wide) == len(re.findall(rf"{machine}\.E\.(?:\w+\.)*128", code[name])), f"{name}: {machine}"
        assert re.search(r"ld\.global\.v", kernel), name
        of_pass, rule = pass_and_rule(name)
        arrays, runs = READ[of_pass][rule]
        walk = code[name][code[name].index("BAR.SYNC") :]  # one thread alone reads the tables before
        under_way = loads_under_way(walk, 64 if dtype in ("bfloat16", "float16") else 128)
        assert under_way >= arrays * runs, f"{of_pass} {rule}: {under_way} loads under way"


# ---- the backend -----------------------------------------------------------------------------------------------------


def test_cpu_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and with what is there."""
    monkeypatch.setattr(cuda, "unavailable", None)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Lookbehind([p], torch.optim.SGD, lr=0.1, backend="cuda")
    refused = "backend: expected one with kernels for tensors on cpu, got 'cuda', which is for CUDA GPUs"
    with pytest.raises(ValueError, match=refused):
        optimizer.step(lambda: p.square().sum().backward())
    assert torch.equal(p.detach(), torch.ones(3))


def test_a_library_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason and what helps; "auto" goes on to what there is."""
    monkeypatch.setattr(cuda, "unavailable", "_native.abi3.so was built without CUDA")
    refused = "backend: 'cuda' is not available: _native.abi3.so was built without CUDA; install the CUDA toolkit"
    with pytest.raises(RuntimeError, match=refused):
        Lookbehind([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, backend="cuda")
    monkeypatch.setattr(triton, "why_not", lambda: "triton is not installed")
    with pytest.warns(UserWarning, match="uses the slower 'reference': _native.*; or triton is not installed"):
        assert resolve("auto", torch.device("cuda")) is reference


def test_auto_takes_cuda_then_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is said to be slow: nobody is warned. A GPU that the library has no code for has Triton's kernels."""
    monkeypatch.setattr(triton, "why_not", lambda: None)
    monkeypatch.setattr(triton, "serves", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for unavailable, code, chosen in ((None, True, cuda), (None, False, triton), ("was not built", True, triton)):
            monkeypatch.setattr(cuda, "unavailable", unavailable)
            monkeypatch.setattr(cuda, "_has_code", lambda device, code=code: code)
            assert resolve("auto", torch.device("cuda:0")) is chosen


def test_a_gpu_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name it is refused; "auto" says why there is nothing faster."""
    monkeypatch.setattr("lookbehind_fused.kernels._warned", set())
    monkeypatch.setattr(cuda, "unavailable", None)
    monkeypatch.setattr(cuda, "_has_code", lambda device: False)
    monkeypatch.setattr(triton, "why_not", lambda: "triton is not installed")
    of_library = "CUDA GPUs of the compute capabilities that its library was compiled for"
    with pytest.warns(UserWarning, match=f"uses the slower 'reference': it is for {of_library}; .*; or triton is not"):
        assert resolve("auto", torch.device("cuda:0")) is reference
    with pytest.raises(ValueError, match=f"for tensors on cuda:0, got 'cuda', which is for {of_library}"):
        resolve("cuda", torch.device("cuda:0"))


def test_addresses_go_with_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many gradients as that takes nothing is uploaded, wherever they are; of one more, what has moved."""
    uploads: list[Tensor] = []
    monkeypatch.setattr(device.Plan, "_upload", lambda self, values, to: uploads.append(to))
    monkeypatch.setattr(cuda, "_kernels", {name: lambda *_: None for name in cuda.KERNELS})
    for count, changes in ((INLINED, 0), (INLINED + 1, 1)):
        case = Case("ascend", torch.float32, [3] * count, row=0).copies()
        params, grads, table = (case.pop(name) for name in ("params", "grads", "table"))
        run = cuda.bind("ascend", params, table, case)
        run(grads)
        uploads.clear()
        run(grads)
        assert not uploads
        run([g.clone() for g in grads])
        assert len(uploads) == changes


def test_a_gradient_laid_out_otherwise_leaves_no_old_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy is where the one before was, as allocators have it, and all others are elsewhere: they are uploaded."""
    count = INLINED + 1
    case = Case("ascend", torch.float32, [3] * (count - 1) + [(3, 4)], row=0).copies()
    params, grads, table = (case.pop(name) for name in ("params", "grads", "table"))
    layouts = torch.tensor([[0, 1, 3, 3, 1]] * (count - 1) + [[0, 3, 4, 4, 1]])  # as buckets have them
    params = [p.contiguous() for p in params]
    table = torch.cat([table, layouts], 1)
    plan = device.Plan(table, params, INLINED)
    plan.refresh(table, params)
    grads = [torch.zeros_like(p) for p in params]
    plan.point_at(table, params, grads)
    assert plan.grads.tolist() == [g.data_ptr() for g in grads]
    other = [torch.ones_like(p) for p in params[:-1]] + [torch.ones(4, 3).t()]
    monkeypatch.setattr(device, "laid_out", lambda params, given: [*given[:-1], grads[-1]])
    plan.point_at(table, params, other)
    assert plan.grads.tolist() == [g.data_ptr() for g in [*other[:-1], grads[-1]]]


def test_a_missing_gradient_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that comes back: which tensors take part is known by then."""
    uploads: list[Tensor] = []
    with launches_do_nothing():
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(INLINED)]
        optimizer = Lookbehind(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="cuda")
        upload = device.Plan._upload
        monkeypatch.setattr(device.Plan, "_upload", lambda *given: (uploads.append(given[2]), upload(*given)))
        for step in range(6):
            for _ in optimizer.evaluations():
                for p in params[step % 2 :]:
                    p.grad = torch.ones(5)
            if step == 1:
                assert uploads  # where the tensors of both are
                uploads.clear()
    assert not uploads


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_devices_without_kernels_have_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, in one line and once."""
    monkeypatch.setattr("lookbehind_fused.kernels._warned", set())
    said = f"backend 'auto' uses the slower 'reference': there are no kernels for {kind} devices"
    with pytest.warns(UserWarning, match=said):
        assert resolve("auto", torch.device(kind)) is reference
    assert resolve("auto", torch.device(kind)) is reference  # a second warning would be an error


def test_the_ops_of_the_package_serve_gpus() -> None:
    """Where the library has kernels for them: the same ops as for CPUs."""
    for name in SCHEMAS:
        op = getattr(torch.ops.lookbehind_fused, name).default
        assert op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA) == (cuda.why_not() is None)
        assert op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU) == (native.why_not() is None)
