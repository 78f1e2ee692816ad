"""Passes by themselves: the table of all of them, sums over thousands of blocks, and the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lookbehind_fused.kernels import BACKENDS, SCHEMAS, Flag, RuleId, reference
from lookbehind_fused.kernels.contract import NUMBERS, Column
from lookbehind_fused.kernels.schema import ARGUMENTS, tensor_table
from tests.gpu.machine import Absent, here

ADD_UP = ("reduce_sq_norm", "descend_align")
OTHERS = tuple(name for name in SCHEMAS if name not in ADD_UP)


class OnGpu:
    """A backend's passes for arguments in host memory: they are taken to the GPU, at the same alignment, and back."""

    def __init__(self, backend: str) -> None:
        self.kernels, self.__name__ = BACKENDS[backend], f"{backend} on the GPU"

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(**arguments: Any) -> None:
            moved = {key: value if key == "table" else self.move(value) for key, value in arguments.items()}
            if "table" in moved and moved["table"].size(1) > Column.ADDRESS:  # by address: those of the copies
                moved["table"] = self.table(moved["table"], moved["params"])
            getattr(self.kernels, name)(**moved)
            for key in arguments:
                for found, given in zip(listed(moved[key]), listed(arguments[key]), strict=True):
                    if isinstance(given, Tensor) and key != "table":
                        given.copy_(found)

        call.__name__ = name
        return call

    def table(self, table: Tensor, params: Sequence[Tensor]) -> Tensor:
        layouts = tensor_table(params, *[[0] * len(params)] * 2)
        return torch.cat([table[:, : Column.ADDRESS], layouts[:, Column.ADDRESS :]], 1)

    def move(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.move(entry) for entry in value]
        if not isinstance(value, Tensor):
            return value
        memory = torch.full((value.storage_offset() + value.numel() + 3,), float("nan")).to(value.dtype)
        memory = memory.to(here.device)
        return memory.as_strided(value.shape, value.stride(), value.storage_offset()).copy_(value)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def table(dtype: str, backend: str, names: Sequence[str] = tuple(SCHEMAS), every: int = 1) -> str:
    """The table of these passes, or every so manieth case of it."""
    from tests.kernels.passes import VARIANTS, cases

    ran, number, on_gpu = 0, 0, OnGpu(backend)
    for name, rule in VARIANTS:
        if name not in names:
            continue
        for case in cases(getattr(torch, dtype), name, rule):
            number += 1
            if number % every == 0:
                case.check(on_gpu)
                ran += 1
    return f"{ran} cases of {number}"


# ---- sums over thousands of blocks -----------------------------------------------------------------------------------


def arguments(name: str, sizes: Sequence[int], flags: int = 0) -> dict[str, Any]:
    """Those of a pass over float32 tensors on the device, by momentum's rule, with numbers between 0 and 1, but fast
    weights at 2 and more: displacements have the size of one, so that no sum of theirs is one of roundings. The old
    state is read from memory of its own, so that every call gives the same, but for ``descend`` and ``descend_ascend``,
    which move their weights on.
    """
    starts, end = [], 0
    for n in sizes:
        starts.append(end)
        end += -(-n // 16) * 16
    own = {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4}
    hyper = [0.05, 0.01, 0.5, 1e30, 1.0, *(own[key] for key in NUMBERS[RuleId.MOMENTUM])]
    params = [torch.rand(n, device=here.device) for n in sizes]
    rows = len(sizes) if flags & Flag.PER_TENSOR else 1

    def flat(least: float = 0.0) -> Tensor:
        return torch.rand(end, device=here.device).add_(least)

    def wide(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.float64, device=here.device)

    make: dict[str, Callable[[], Any]] = {
        "params": lambda: params,
        "grads": lambda: [torch.rand_like(p) for p in params],
        "slow": flat,
        **dict.fromkeys(("fast", "first"), lambda: flat(2.0)),
        "state": lambda: [flat()],
        "steps": lambda: torch.zeros(len(sizes), device=here.device),
        "steps_from": lambda: torch.ones(len(sizes), device=here.device),
        "table": lambda: tensor_table(params, starts, [0] * len(sizes)),
        "sq_norms": lambda: None if name in ("descend", "descend_interpolate", "descend_align") else wide(1, 2),
        "row": lambda: 0 if name == "reduce_sq_norm" else -1,
        "hyper": lambda: torch.tensor([hyper], dtype=torch.float64, device=here.device),
        "rule": lambda: int(RuleId.MOMENTUM),
        "flags": lambda: int(flags),
        "sums": lambda: wide(rows, 3),
        "state_from": list,
    }
    return {key: make[key]() if key in make else None for key in ARGUMENTS[name]}


def bound(backend: str, name: str, given: dict[str, Any]) -> Callable[[Sequence[Tensor]], None]:
    """The pass, to be called with gradients."""
    rest = {key: value for key, value in given.items() if key not in ("params", "grads", "table", "dtype")}
    return BACKENDS[backend].bind(name, given["params"], given["table"], rest)


def handed_over(backend: str, name: str, flags: int = 0) -> str:
    """What the last block adds up, that thousands of others have left for it: the reference's sums, the same bits each
    time. Two sets of gradients take turns: what is left of the call before would be wrong.
    """
    large = 100_000_000 if name == "reduce_sq_norm" else 30_000_000
    numbers = range(here.chosen(5000, 5000, 200))
    repeats, worst = here.chosen(150, 30, 3), 0.0
    for sizes in (
        [here.size(large)],
        [1 + 37 * i % 9000 for i in numbers],
        [here.size(25_000_000), 3, here.size(70_001)],
    ):
        given = arguments(name, sizes, flags)
        key = "sums" if "sums" in given else "sq_norms"
        if "state_from" in given:
            given["state_from"] = [torch.rand_like(given["state"][0])]
        sets = [given["grads"], [g.flip(0) * 1.5 for g in given["grads"]]]
        expected = [summed(name, given, grads) for grads in sets]
        run, first = bound(backend, name, given), [None, None]
        for repeat in range(2 * repeats):
            given[key].fill_(float("nan"))
            run(sets[repeat % 2])
            found = given[key].clone()
            if first[repeat % 2] is None:
                first[repeat % 2] = found
                error = float(((found - expected[repeat % 2]) / expected[repeat % 2]).abs().max())
                if not error < 1e-6:  # of sums of positive numbers, each a few roundings to float32 off
                    raise AssertionError(f"{len(sizes)} tensors of {sum(sizes):,} elements: {error:.1e} off")
                worst = max(worst, error)
            elif not torch.equal(found, first[repeat % 2]):
                raise AssertionError(f"{len(sizes)} tensors of {sum(sizes):,} elements: call {repeat} has other bits")
    return f"1, {len(numbers):,} and 3 tensors, {2 * repeats} calls each, largest error {worst:.1e}"


def summed(name: str, given: dict[str, Any], grads: Sequence[Tensor]) -> Tensor:
    """The sums of the reference in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(entry) for entry in value]
        return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    written = {key: value.clone() for key, value in given.items() if key in ("sums", "sq_norms") and value is not None}
    everything = {key: wide(value) for key, value in {**given, "grads": list(grads), **written}.items()}
    everything |= {key: given[key].cpu() for key in ("hyper", "steps", "steps_from") if key in given}
    getattr(reference, name)(**everything)
    return written["sums" if "sums" in written else "sq_norms"]


# ---- what others find ------------------------------------------------------------------------------------------------


def sanitized(tool: str) -> str:
    """A sample of the passes on the CUDA kernels under a tool of compute-sanitizer, in a process of its own."""
    code = f"from tests.gpu import machine, passes; machine.here.begin({here.dry}, False); "
    code += f"print(passes.table('float32', 'cuda', every={here.chosen(11, 41, 101)}))"
    command = [sys.executable, "-c", code]
    if here.dry:
        here.stand_in("no sanitizer")
    elif not shutil.which("compute-sanitizer"):
        raise Absent("there is no compute-sanitizer")
    else:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{tool}: {(done.stdout + done.stderr)[-2000:]}")
    return (
        done.stdout.strip().splitlines()[-1]
        if here.dry
        else f"nothing, in {here.chosen('every 11th', 'every 41st', '')} case"
    )
