"""Where the checks run: on a GPU, or in a dry run on the CPU, with a stand-in for each thing that a CPU has not.

What is a GPU's, a check takes from ``here``. A stand-in that was used is noted, and the check's row says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from lookbehind_fused.kernels import device, native
from tests.kernels import graphed

Value = TypeVar("Value")


class Absent(Exception):
    """What a check needs is not on this machine."""


class Machine:
    """The GPU, or what stands in for it.

    Attributes:
        device: of tensors.
        dry, quick: a dry run; the checks that take four minutes.
        instead: what has stood in for what since ``instead`` was cleared.
    """

    device, dry, quick = "cuda", False, False

    def __init__(self) -> None:
        self.instead: dict[str, None] = {}

    def begin(self, dry: bool, quick: bool) -> None:
        """Once in a process, before any check."""
        self.dry, self.quick = dry, quick
        if dry:
            self.device = "cpu"
            use_stand_ins()
            graphed.use_double()

    def chosen(self, whole: Value, quick: Value, dry: Value) -> Value:
        """What belongs to this kind of run."""
        return dry if self.dry else quick if self.quick else whole

    def size(self, elements: int) -> int:
        """So many, but few in a dry run, in which nobody looks at speed."""
        return elements if not self.dry else max(1, min(elements, 3000 + elements // 100_000))

    def stand_in(self, what: str) -> None:
        """Note what has stood in for a GPU's."""
        self.instead[what] = None

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Within the block a wait for the device is an error."""
        if self.dry:
            self.stand_in("waits are not looked for")
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Within the block the current stream is a new one, which goes on where the other stands, and the other after
        it.
        """
        if self.dry:
            self.stand_in("no streams")
            yield
            return
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            yield
        before.wait_stream(stream)

    def hold_up(self) -> None:
        """Have the current stream wait for a millisecond or so, during which the host runs on."""
        if not self.dry:
            torch.cuda._sleep(2_000_000)

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Of one of so many runs, by device events: the waits for the host between their launches are counted in."""
        if self.dry:
            self.stand_in("the host's clock")
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats

    def kernels(self, run: Callable[[], Any]) -> list[str]:
        """Names of what is launched on the device."""
        self.synchronize()
        kind = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kind.CPU if self.dry else kind.CUDA]) as profile:
            run()
            self.synchronize()
        if self.dry:
            self.stand_in("calls of native, not launches")
            return [e.name for e in profile.events() if e.name.startswith(f"{native.NAMESPACE}::")]
        return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


here = Machine()


def use_stand_ins() -> None:
    """From now on the GPU backends take CPU tensors, and where they would launch kernels, native's pass runs: all of
    Python between an optimizer and a launch is theirs.
    """
    from lookbehind_fused.kernels import cuda, triton

    triton.why_not = cuda.why_not = lambda: None
    triton.serves = cuda.serves = lambda device: True
    original = device.Call.__init__

    def init(call: device.Call, prepare: Any, name: str, params: list, given: Any, *of_plan: Any) -> None:
        original(call, lambda *_: None, name, params, given, *of_plan)
        if params:
            rest = {key: value for key, value in given.items() if key not in ("table", "dtype")}
            run = native.bind(name, params, given["table"], rest)
            call.launches = [lambda: run(call.kept)]

    device.Call.__init__ = init  # type: ignore[method-assign]
