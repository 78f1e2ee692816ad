"""The table of passes on the CUDA kernels, without a GPU: compiled by nvcc and executed.

A process of its own, since the library that it loads takes CPU tensors for the GPU's::

    python -m tests.kernels.cuda_cases sm80 --dtype float32 --passes descend

Everything between Python and the kernels is the package's own: the ops, their checks, the launches. ``gpusim``, which
has to be on PYTHONPATH, executes what is launched. Prints a line for each case that fails, and last how many there
were.
"""

import argparse
import ctypes
import itertools
import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from gpusim.ptxsim import PTX, traffic
from torch import Tensor

from lookbehind_fused.kernels import Flag, cuda, device, reference
from lookbehind_fused.kernels.contract import INLINED
from tests.kernels import graphed
from tests.kernels.cuda_build import Build
from tests.kernels.passes import VARIANTS, Case, cases, drawn
from tests.kernels.test_triton import FULL, full_case

SIZES = [7, 1, 0, 5_137, 33, 1_500]
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint * 3), ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


class Executor:
    """Executes what the library launches. From its creation on, the backend takes CPU tensors.

    Attributes:
        opts: of gpusim's ``PTX.launch``.
        reached, readonly: the tensors that a kernel may reach, and those that it may not write.
        log: of each launch the kernel's name and resources, and the statistics of gpusim.
    """

    def __init__(self, build: Build, capability: int) -> None:
        self.build, self.capability = build, capability
        self.modules: dict[torch.dtype, PTX] = {}
        self.opts: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        self.used: dict[str, dict[str, int]] = {}
        torch.ops.load_library(str(build.library))
        self.library = ctypes.CDLL(str(build.library))
        self.callback = CALLBACK(self.execute)  # to be kept
        self.library.set_executor(self.callback)
        cuda.unavailable, cuda.serves = None, lambda device: True
        self.by_address: tuple[list[Tensor], list[Tensor]] = [], []
        self.prepare, cuda._prepare = cuda._prepare, self.prepared
        self.call_launch, device.Call.launch = device.Call.launch, self.of_call()

    def of_call(self) -> Any:
        """In the place of ``Call.launch``: notes the tensors that the kernels find by address."""

        def launch(call: device.Call) -> None:
            self.by_address = call.params, call.kept
            self.call_launch(call)

        return launch

    def prepared(self, name: str, plan: device.Plan, dtype: torch.dtype, arguments: dict[str, Any]) -> Any:
        """In the place of ``cuda._prepare``: notes, at each launch, the tensors that the kernel is given."""
        launch = self.prepare(name, plan, dtype, arguments)

        def noted() -> None:
            self.note(name, arguments)
            sizes = {"elements": plan.elements, "row_count": plan.row_count, "group_count": plan.group_count}
            self.arguments = {**arguments, **sizes, "dtype": dtype}
            launch()

        return noted

    def note(self, name: str, arguments: dict[str, Any]) -> None:
        """Only what the op's schema says is written may be written."""
        given = [argument for argument in cuda._kernels[name]._schema.arguments]
        tensors = [(a, arguments.get(a.name)) for a in given if isinstance(arguments.get(a.name), Tensor)]
        written = [t for a, t in tensors if a.alias_info is not None and a.alias_info.is_write]
        places = {t.data_ptr() for t in written}
        params, grads = self.by_address
        self.name, self.reached = name, [*params, *written]
        self.readonly = [*grads, *(t for _, t in tensors if t.data_ptr() not in places)]

    def module(self, dtype: torch.dtype) -> PTX:
        """The kernels for parameters of a dtype."""
        if dtype not in self.modules:
            self.modules[dtype] = PTX(self.build.ptx(str(dtype).removeprefix("torch."), self.capability))
        return self.modules[dtype]

    def execute(self, name: bytes, grid: Any, block: Any, arguments: Any) -> int:
        """Run a kernel; its error becomes that of the launch."""
        try:
            mangled = name.decode()
            (module,) = (m for m in map(self.module, self.dtypes()) if mangled in m.kernels)
            size = module.kernels[mangled].param_bytes
            statistics = module.launch(
                mangled, tuple(grid.contents), tuple(block.contents), [ctypes.string_at(arguments[0], size)],
                register=[t for t in self.reached if t.numel()], readonly=[t for t in self.readonly if t.numel()],
                **self.opts,
            )  # fmt: skip
            given = [t for t in [*self.reached, *self.readonly] if t.numel()]
            used = self.resources(mangled)
            self.log.append({"name": self.name, "resources": used, "stats": statistics, "given": given})
        except Exception as error:
            self.library.set_message(f"{type(error).__name__}: {error}".encode())
            return 1
        return 0

    def resources(self, kernel: str) -> dict[str, int]:
        """Registers, stack and shared memory of a kernel, where it is compiled to machine code."""
        if not self.used and self.build.machine_code:
            for dtype in self.build.dtypes:
                self.used |= self.build.resources(dtype, self.capability)
        return self.used.get(kernel, {})

    def register(self, *tensors: Tensor, readonly: bool = False) -> None:
        """Nothing: what a call is given is noted."""

    def clear(self) -> None:
        """Forget what has been launched."""
        self.log.clear()

    def dtypes(self) -> Iterable[torch.dtype]:
        return [getattr(torch, name) for name in self.build.dtypes]


def main() -> int:
    """0 if every case passes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("where", choices=["sm80", "sm90", "sm100"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--passes", default="")
    parser.add_argument("--sample", type=int, default=1, help="every how manieth case")
    parser.add_argument("--most", type=int, default=10**9, help="how many cases at the most")
    parser.add_argument("--seed", type=int, help="instead of every so manieth, draw as many cases as --most says")
    parser.add_argument("--alone", action="store_true", help="compile nothing but what is asked for")
    parser.add_argument("--steps", action="store_true", help="instead: whole steps of the optimizer")
    parser.add_argument("--many", action="store_true", help="instead: 1 to 441 tensors, and one of 257 chunks")
    parser.add_argument("--bytes", action="store_true", help="instead: what each pass moves")
    parser.add_argument("--refused", action="store_true", help="instead: arguments that no kernel is launched with")
    parser.add_argument("--graphed", nargs="*", help="instead: captured steps, of parts of names")
    parser.add_argument("--far", action="store_true", help="instead: the last chunk of a tensor of 3e9 elements")
    chosen = parser.parse_args()
    capability = int(chosen.where.removeprefix("sm"))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # with NaN in all fresh memory
    build = Build([chosen.dtype], [capability], machine_code=False) if chosen.alone else Build()
    executor = Executor(build, capability)
    if chosen.far:
        return far(executor)
    if chosen.bytes:
        return report(moved(executor, *row) for row in FULL)
    if chosen.refused:
        return report(refusals(executor))
    if chosen.steps:
        return whole_steps(chosen, build)
    if chosen.graphed is not None:
        return graphed.report("cuda", chosen.graphed)
    if chosen.many:
        many = list(enumerate(many_tensors()))
        many = many if chosen.seed is None else random.Random(chosen.seed).sample(many, chosen.most)
        return report(check(case, executor, number) for number, case in many)
    names = chosen.passes.split(",") if chosen.passes else sorted({name for name, _ in VARIANTS})
    dtype = getattr(torch, chosen.dtype)
    if chosen.seed is None:
        table = (case for name, rule in VARIANTS if name in names for case in cases(dtype, name, rule, SIZES))
        numbered = itertools.islice(enumerate(table, 1), chosen.sample - 1, None, chosen.sample)
    else:
        numbered = drawn(dtype, names, SIZES, chosen.most, chosen.seed)
    return report(check(case, executor, number) for number, case in itertools.islice(numbered, chosen.most))


def report(found: Iterable[str]) -> int:
    """Print what failed and how many there were."""
    ran = failed = 0
    for error in found:
        ran += 1
        failed += bool(error)
        if error:
            print(error[:2000])
    print(f"{ran} cases, {failed} failed")
    return int(failed > 0 or ran == 0)


def check(case: Case, executor: Executor, number: int) -> str:
    """What is wrong with a case, or nothing. Every fifth case runs in a random schedule, if it has few tensors: that
    takes ten times as long.

    Two blocks that touch one element, one of them writing, are an error, but in the kernels that add up: there the last
    block reads on purpose what the others have written.
    """
    adds_up = case.name in ("reduce_sq_norm", "descend_align") or case.arguments.get("row", -1) >= 0
    schedule = "random" if number % 5 == 1 and len(case.spans) < 30 else "lockstep"
    executor.opts = {"strict": not adds_up, "schedule": schedule, "seed": number, "approx": "jitter"}
    try:
        case.check(cuda)
        if case.name == "reduce_sq_norm" or (case.name == "descend_align" and case.arguments["steps_from"] is not None):
            check_again(case)
    except Exception as error:
        flags, rule = case.arguments.get("flags"), case.arguments.get("rule", "")
        return f"{case.name} {rule} {case.dtype} flags {flags} case {number}: {type(error).__name__}: {error}"
    return ""


def check_again(case: Case) -> None:
    """The same from a second call with the same arguments, which finds the first one's counters and partial sums."""
    expected, arguments = case.run(reference, torch.float64), case.copies()
    for _ in range(2):
        written = arguments["sums"] if "sums" in arguments else arguments["sq_norms"][case.arguments["row"]]
        written.fill_(float("nan"))
        getattr(cuda, case.name)(**arguments)
        case.check_written(arguments, expected)


def many_tensors() -> Iterable[Case]:
    """Sums over more tensors, and over more chunks of one, than a block has threads; as many gradients as go with a
    launch, and more.
    """
    for name, flags in (
        ("reduce_sq_norm", Flag.ADAPTIVE),
        ("ascend", 0),
        ("descend_align", 0),
        ("descend_align", Flag.PER_TENSOR),
        ("interpolate", Flag.PER_TENSOR),
    ):
        rule = "momentum" if name == "descend_align" else "none"
        for count in (1, 2, 31, INLINED, INLINED + 1):
            yield Case(name, torch.float32, [(5 * t + 1) % 77 for t in range(count)], rule, flags, seed=count)
    yield Case("reduce_sq_norm", torch.float32, [3, 257 * 4096 + 5, 4096], seed=1)


def moved(executor: Executor, name: str, rule: str, flags: int, reads: int, writes: int) -> str:
    """What is wrong with a pass over whole chunks of float32: how many arrays of the model's size it reads and writes,
    each once and 16 bytes at a time; and how often it computes in double: but for sums one thread of a block does.
    """
    case = full_case(name, rule, flags, torch.float32)
    if "grads" in case.arguments:
        case.arguments["grads"] = [g.clone() for g in case.arguments["grads"]]  # aligned
    size = case.shapes[0][0]
    executor.clear()
    executor.opts = {"stats": True}
    case.run(cuda)
    (launch,) = executor.log
    large = {t.data_ptr(): t for t in launch["given"] if t.numel() >= size}
    found = [traffic(launch["stats"], {"": t})[""] for t in large.values()]
    read, written = [t.read for t in found if t.read], [t.written for t in found if t.written]
    dynamic = launch["stats"]["dyn"]
    wide = 16 * sum(count for access, count in dynamic.items() if ".global" in access and ".v4." in access)
    moves = ("ld.", "st.", "mov.")
    double = sum(n for access, n in dynamic.items() if ".f64" in access and not access.startswith(moves))
    # Sums of each thread are converted and added up: two of a norm for each chunk, three otherwise; then those of a
    # warp's 32 threads in five steps, which the last block does again, of a norm for its tensor and for all.
    chunks, spans = size // device.CHUNK, -(-size // device.SPAN)
    sums = {"reduce_sq_norm": 4 * chunks + 39 * spans, "descend_align": 34 * chunks}
    fits = double <= 256 * sums.get(name, chunks)
    if (read, written) == ([4 * size] * reads, [4 * size] * writes) and wide == sum(read) + sum(written) and fits:
        return ""
    return f"{name} {rule} {flags}: reads {read}, writes {written}, 16 bytes at a time {wide}, in double {double}"


def refusals(executor: Executor) -> Iterable[str]:
    """Arguments that are refused before anything is launched, by name."""
    case = Case("descend_align", torch.float32, [33, 7], "adam")
    executor.opts = {}
    case.run(cuda)
    right = dict(executor.arguments)
    wrong = {
        "rows": right["rows"].view(-1),
        "chunks": right["chunks"].long(),
        "dtype": torch.int32,
        "grads": right["grads"][1:],
        "slow": right["slow"].double(),
        "fast_from": torch.zeros(right["elements"] * 2)[::2],
        "s1": None,
        "f0": right["f0"][: right["elements"] - 1],
        "first": torch.zeros(right["elements"] + 1)[1:],
        "steps": right["steps"][:1],
        "steps_from": right["steps_from"].int(),
        "sq_norms": right["sq_norms"].float(),
        "hyper": right["hyper"][:1],
        "done": right["done"].long(),
        "rule": 5,
        "flags": int(Flag.DERIVES | Flag.NESTEROV),
        "counters": right["counters"][1:],
        "partials": right["partials"][:-1],
        "out": None,
    }
    named = {"s1": "state", "f0": "state_from"}
    executor.clear()
    for name, value in wrong.items():
        arguments = {**right, name: value}
        try:
            cuda._kernels[case.name](**{key: arguments.get(key) for key in cuda._arguments[case.name]})
            yield f"{name}: not refused"
        except RuntimeError as error:
            yield "" if f"{named.get(name, name)}:" in f"{error}".replace(",", ":") else f"{name}: {error}"
    yield f"{len(executor.log)} launches" if executor.log else ""


def whole_steps(asked: argparse.Namespace, build: Build) -> int:
    """Lookbehind on this backend against the reference in float64, over settings and base optimizers."""
    from tests.gpu.steps import step_cases, trained

    chosen = step_cases(asked.sample)
    if asked.seed is not None:
        chosen = random.Random(asked.seed).sample(step_cases(), asked.most)
    bounds = {"float64": 1e-12, "float32": 2 * 2e-6}

    def errors() -> Iterable[str]:
        for base, settings in chosen:
            expected = trained("cpu", "reference", base, settings, torch.float64, steps=2)
            for dtype, bound in ((getattr(torch, name), bounds[name]) for name in bounds if name in build.dtypes):
                found = trained("cpu", "cuda", base, settings, dtype, steps=2)
                error = float((found - expected).abs().max() / expected.abs().max())
                yield "" if error <= bound else f"{base[0].__name__} {settings} {dtype}: {error:.1e} > {bound:.0e}"

    return report(errors())


def far(executor: Executor) -> int:
    """Run the last block of an ascent over 3,000,000,001 elements, of which only those of its chunk have memory.

    The addresses that the tables hold are those of the chunk less its offset: only the right offset leads back.
    """
    size = 3_000_000_001
    number = size // device.CHUNK
    begin, count = number * device.CHUNK, size - number * device.CHUNK
    p, g, slow = torch.ones(count), torch.full((count,), 2.0), torch.zeros(count)
    expected = p + 0.5 * g
    arguments = {
        "rows": torch.tensor([[0, -begin, size, 0, p.data_ptr() - 4 * begin]]),
        "chunks": torch.tensor([[0, number]], dtype=torch.int32),
        "dtype": torch.float32,
        "elements": count,
        "row_count": 1,
        "group_count": 1,
        "grads": torch.tensor([g.data_ptr() - 4 * begin]),
        "perturbed": None,
        "slow": slow,
        "sq_norms": torch.tensor([[1.0, 1.0]], dtype=torch.float64),
        "hyper": torch.tensor([[0.5, 0, 0, 0, 1]], dtype=torch.float64),
        "flags": 0,
        "done": None,
    }
    executor.by_address = [p], [g]
    executor.note("ascend", arguments)
    cuda._kernels["ascend"](**arguments)
    assert torch.equal(slow, torch.ones(count))
    assert torch.equal(p, expected)
    print(f"the last chunk of {size:,} elements is at its place")
    return 0


if __name__ == "__main__":
    sys.exit(main())
