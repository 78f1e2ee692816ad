"""What the Triton and CUDA kernels move, counted from their compiled code as it is executed; no GPU is needed.

`PYTHONPATH=<folder of gpusim> python -m benchmarks.bench.traffic` prints a table: for each pass of an outer step the
bytes that it reads and writes per parameter, its registers and its 16-byte accesses, and for the whole step what
DESIGN's section 3 allows, and what the naive loop and the foreach form move, counted from their torch ops. float32, one
tensor of whole chunks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench import predictions
from benchmarks.bench.bounds import bytes_per_parameter
from benchmarks.bench.contenders import Foreach, Naive
from benchmarks.bench.host import host_times
from benchmarks.bench.settings import Settings
from lookbehind_fused import Lookbehind
from lookbehind_fused.kernels import BACKENDS

SIZE = 4 * 4096
SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4})
STEPS = {
    "SGD, k = 1": (*SGD, Settings(k=1)),
    "SGD, k = 2": (*SGD, Settings()),
    "SGD, k = 3": (*SGD, Settings(k=3)),
    "SGD, k = 2, ASAM": (*SGD, Settings(asam=True)),
    "SGD, k = 2, adaptive": (*SGD, Settings(alpha="adaptive", scope="global")),
    "SGD, k = 3, adaptive": (*SGD, Settings(k=3, alpha="adaptive", scope="global")),
    "Adam, k = 2": (torch.optim.Adam, {"lr": 0.01}, Settings()),
    "AdamW with amsgrad, k = 2": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}, Settings()),
}


@dataclass
class Launch:
    """One kernel launch: bytes per parameter, registers and stack of a thread, and its accesses of 16 bytes."""

    kernel: str
    read: dict[str, float] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    registers: int = 0
    stack: int = 0
    wide: int = 0

    @property
    def bytes(self) -> float:
        """Of all arrays of the model's size, read and written."""
        return sum(self.read.values()) + sum(self.written.values())


def launches(
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    settings: Settings,
    driver: Any,
    backend: str = "triton",
) -> list[Launch]:
    """The kernels of a second outer step, executed by the backend's driver."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(SIZE, generator=generator).requires_grad_()
    g = torch.randn(SIZE, generator=generator)
    optimizer = Lookbehind(
        [p], base, rho=settings.rho, k=settings.k, alpha=settings.alpha, alpha_scope=settings.scope,
        adaptive=settings.asam, eta=settings.eta, backend=backend, **options,
    )  # fmt: skip
    driver.clear()
    driver.opts.update(stats=True)
    driver.register(p.detach())
    driver.register(g, readonly=True)
    given: list[dict[str, Tensor]] = []  # of each launch, by what its pass calls them
    module = BACKENDS[backend]
    with patch.object(module, "bind", noting(module.bind, driver, given)):
        for _ in range(2):
            driver.log.clear()
            given.clear()
            for _ in optimizer.evaluations():
                p.grad = g
    found = []
    for entry, arrays in zip(driver.log, given, strict=True):
        moved = traffic_of(entry, {"params": p.detach(), "grads": g, **arrays})
        dynamic = entry["stats"]["dyn"]
        found.append(
            Launch(
                entry["name"],
                {name: t.read / SIZE for name, t in moved.items() if t.read},
                {name: t.written / SIZE for name, t in moved.items() if t.written},
                entry["resources"]["reg"],
                entry["resources"]["stack"],
                sum(count for access, count in dynamic.items() if ".global." in access and ".v4." in access),
            )
        )
    return found


def noting(bind: Callable[..., Any], driver: Any, given: list[dict[str, Tensor]]) -> Callable[..., Any]:
    """A backend's ``bind``, whose passes add to ``given``, for each kernel that they launch, the arrays of the model's
    size that they were bound to.
    """

    def bind_noted(name: str, params: Any, table: Tensor, arguments: Mapping[str, Any]) -> Callable[..., None]:
        run = bind(name, params, table, arguments)
        given_once: dict[int, tuple[str, Tensor]] = {}  # by address: a pass may be given the same memory in two roles
        for role, value in arguments.items():
            several = isinstance(value, (list, tuple))
            for i, array in enumerate(value if several else [value]):
                if isinstance(array, Tensor) and array.numel() >= SIZE:
                    given_once.setdefault(array.data_ptr(), (f"{role} {i}" if several else role, array))
        arrays = dict(given_once.values())

        def noted(grads: Any) -> None:
            before = len(driver.log)
            run(grads)
            given.extend([arrays] * (len(driver.log) - before))

        return noted

    return bind_noted


def traffic_of(entry: dict[str, Any], arrays: dict[str, Tensor]) -> dict[str, Any]:
    """Of one launch, by array; those that it was not given are left out."""
    from gpusim.ptxsim import traffic

    found = {}
    for name, array in arrays.items():
        with contextlib.suppress(KeyError):
            found |= traffic([entry["stats"]], {name: array})
    return found


class Moved(TorchDispatchMode):
    """Bytes of the model's size that torch ops read and write, an argument or result counting once an op."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        schema, reads, writes = func._schema, 0, 0
        for argument, value in zip(schema.arguments, args, strict=False):
            size = sum(t.nbytes for t in tensors(value) if t.numel() >= SIZE)
            mutates = argument.alias_info is not None and argument.alias_info.is_write
            only_written = mutates and schema.name.split("::")[1].strip("_") in (
                "copy",
                "_foreach_copy",
                "zero",
                "fill",
            )
            reads += 0 if only_written else size
            writes += size if mutates else 0
        if not any(r.alias_info is not None for r in schema.returns):
            writes += sum(t.nbytes for t in tensors(result) if t.numel() >= SIZE)
        self.bytes += reads + writes
        return result


def tensors(value: Any) -> list[Tensor]:
    """Those in an argument."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [t for t in values if isinstance(t, Tensor)]


def moved_by(contender: Callable[[Sequence[Tensor], Settings], Any], settings: Settings) -> float:
    """Bytes per parameter of a contender's second step."""
    p = torch.randn(SIZE).requires_grad_()
    run = contender([p], settings)
    counted = Moved()
    for step in range(2):
        evaluations = iter(run.evaluations())
        while True:
            with counted:
                if next(evaluations, None) is None:
                    break
            p.grad = torch.randn(SIZE)
        if step == 0:
            counted.bytes = 0
    return counted.bytes / SIZE


def table(capability: int) -> str:
    """All steps, as Markdown; with the CUDA kernels beside Triton's where there is an nvcc."""
    from gpusim import simdriver
    from gpusim.cuda import find_nvcc

    drivers = {"triton": simdriver.activate(capability)}
    if find_nvcc():
        from tests.kernels.cuda_build import Build
        from tests.kernels.cuda_cases import Executor

        drivers["cuda"] = Executor(Build(), capability)
    lines = [
        f"| step | pass | read | written | bytes, registers, stack: {'; '.join(drivers)} |",
        "|---|---|---|---|---|",
    ]
    for title, (base, options, settings) in STEPS.items():
        found = {name: launches(base, options, settings, driver, name) for name, driver in drivers.items()}
        for of_backends in zip(*found.values(), strict=True):
            launch = of_backends[0]
            of = [", ".join(name for name in side) for side in (launch.read, launch.written)]
            numbers = "; ".join(f"{x.bytes:g}, {x.registers}, {x.stack}" for x in of_backends)
            lines.append(f"| {title} | `{launch.kernel}` | {of[0]} | {of[1]} | {numbers} |")
        total = "; ".join(f"**{sum(launch.bytes for launch in all_of):g}**" for all_of in found.values())
        beside = f"{len(found['triton'])} launches"
        if base is torch.optim.SGD:
            allowed, naive, foreach = (
                bytes_per_parameter(settings),
                moved_by(Naive, settings),
                moved_by(Foreach, settings),
            )
            beside += f"; DESIGN allows {allowed}; foreach {foreach:g}, naive {naive:g} (2k gradients)"
        lines.append(f"| {title} | all | {beside} | | {total} |")
    simdriver.deactivate()
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 2 where the tools for it are missing."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, default=90, help="compute capability to compile for (default: 90)")
    chosen = parser.parse_args(argv)
    for name in ("triton", "gpusim"):
        if importlib.util.find_spec(name) is None:
            print(f"benchmarks.bench.traffic: needs {name} on PYTHONPATH", file=sys.stderr)
            return 2
    print(table(chosen.sm))
    host = {tensors: statistics.median(host_times(tensors)) for _, tensors in predictions.MODELS.values()}
    print(f"\n{predictions.table(host)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
