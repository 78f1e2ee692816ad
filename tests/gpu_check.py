"""Everything that only a GPU can show, in one go: `make gpu-check`. Without a GPU it says so in a line and exits 0.

Needs nothing but the Python that runs it, with a PyTorch for the GPU. Prints what it checks as it goes, and one table
at the end, with the seconds that each check took; 1 if a check failed. Arguments are parts of names: only checks that
have one of them in theirs are run, as in `make gpu-check ARGS="cuda: 'own work'"`.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lookbehind_fused import ASAM, Lookahead, Lookbehind, MultistepSAM, analysis
from lookbehind_fused.kernels import BACKENDS as BACKENDS_BY_NAME
from tests.kernels import graphed

DTYPES = ("float32", "bfloat16", "float16", "float64")
BACKENDS = ("triton", "cuda")
rows: list[tuple[str, str, str, str]] = []


def main() -> int:
    """0 if there is no GPU or every check passes."""
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no GPU that PyTorch can use; nothing was checked")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    for backend in BACKENDS:
        if reason := BACKENDS_BY_NAME[backend].why_not():
            rows.append((f"{backend}: everything", "absent", "", reason))
            continue
        for dtype in DTYPES:
            check(
                f"{backend}: every pass and rule against the reference in float64: {dtype}",
                lambda dtype=dtype, backend=backend: table_of_passes(dtype, backend),
            )
        for what, action in {
            "whole steps against the reference on the CPU in float64": whole_steps,
            "the same bits from run to run": same_bits,
            "a step never waits for the device": no_synchronisation,
            "a step that the caller captures replays as it ran": graph_capture,
            "captured steps, between them eager ones, other lrs, overflows": graphed.on_gpu,
            "launches per gradient evaluation": launches,
            "gradients that are lazy views, or far from the moments": gradients,
            "a gradient that is not finite undoes the step, without a wait": undone,
            "a scaler's overflow undoes the step, also under Lookahead, without a wait": scaled,
            "a model that is moved to the GPU and back between steps": moved,
        }.items():
            check(f"{backend}: {what}", lambda action=action, backend=backend: action(backend))
    check("analysis finds on the GPU what it finds on the CPU", analysed)
    if not BACKENDS_BY_NAME["cuda"].why_not():
        check("cuda: compute-sanitizer finds nothing", sanitized)
    for name, shapes in sets().items():
        check(f"own work, {name}", lambda shapes=shapes: own_work(shapes))
    if not rows:
        print(f"gpu-check: no check has any of {sys.argv[1:]} in its name", file=sys.stderr)
        return 2
    width = max(len(row[0]) for row in rows)
    print()
    for what, verdict, seconds, found in rows:
        print(f"{what.ljust(width)}  {verdict:6}  {seconds:>7}  {found}")
    return int(any(verdict == "FAILED" for _, verdict, _, _ in rows))


def check(what: str, action: Callable[[], str]) -> None:
    """Run one check, if it is asked for, and note what it found."""
    if not any(part in what for part in sys.argv[1:] or [""]):
        return
    print(f"... {what}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        verdict, found = "holds", action()
    except Exception as error:
        traceback.print_exc()
        verdict, found = "FAILED", f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:150]}"
    rows.append((what, verdict, f"{time.perf_counter() - start:.1f} s", found))
    print(f"    {' '.join(rows[-1][1:])}", file=sys.stderr, flush=True)


# ---- right -----------------------------------------------------------------------------------------------------------


class OnGpu:
    """A backend's passes for arguments in host memory: they are taken to the GPU, at the same alignment, and back."""

    def __init__(self, backend: str) -> None:
        self.kernels, self.__name__ = BACKENDS_BY_NAME[backend], f"{backend} on the GPU"

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(**arguments: Any) -> None:
            moved = {key: value if key == "table" else self.move(value) for key, value in arguments.items()}
            getattr(self.kernels, name)(**moved)
            for key in arguments:
                for there, here in zip(listed(moved[key]), listed(arguments[key]), strict=True):
                    if isinstance(here, Tensor) and key != "table":
                        here.copy_(there)

        call.__name__ = name
        return call

    def move(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.move(entry) for entry in value]
        if not isinstance(value, Tensor):
            return value
        memory = torch.full((value.storage_offset() + value.numel() + 3,), float("nan")).to(value.dtype).cuda()
        return memory.as_strided(value.shape, value.stride(), value.storage_offset()).copy_(value)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def table_of_passes(dtype: str, backend: str, sample: int = 1) -> str:
    """The table of passes, or every ``sample``-th case of it."""
    from tests.kernels.passes import VARIANTS, cases

    number, on_gpu = 0, OnGpu(backend)
    for name, rule in VARIANTS:
        for case in cases(getattr(torch, dtype), name, rule):
            number += 1
            if number % sample == 0:
                case.check(on_gpu)
    return f"{number // sample} cases"


SETTINGS = [
    {"k": k, "alpha": alpha, "alpha_scope": scope, "adaptive": adaptive, "max_grad_norm": most}
    for k, (alpha, scope), adaptive, most in itertools.product(
        (1, 2, 3), ((0.6, "global"), ("adaptive", "global"), ("adaptive", "tensor")), (False, True), (None, 0.5)
    )
]
FAMILY = [
    {"method": MultistepSAM, "k": 3, "average": True},
    {"k": 2, "alpha": 0.4, "microbatches": 2},
    {"k": 3, "alpha": "adaptive", "ascent_gradient": "previous"},
    {"k": 3, "alpha": 1.0, "rho_scope": "total"},
    {"method": ASAM, "lookahead": 2},
]
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01}),
]


def step_cases(sample: int = 1) -> list[tuple[Any, dict[str, Any]]]:
    """Base optimizers and settings of whole steps, every ``sample``-th of them; and the family over the first base."""
    return [*itertools.product(BASES, SETTINGS)][::sample] + [(BASES[0], method) for method in FAMILY]


def trained(
    device: str, backend: str, base: Any, settings: dict[str, Any], dtype: torch.dtype, steps: int = 3
) -> Tensor:
    """The weights after some steps; gradients are a formula of the weights, so that nothing else differs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(130, 70), (5000,), (3, 3), (), (7,)]
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)) for s in shapes]
    slopes = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    own = dict(settings)
    make, inner_steps = own.pop("method", Lookbehind), own.pop("lookahead", None)
    optimizer = make(params, base[0], rho=0.1, backend=backend, **own, **base[1])
    if inner_steps:
        optimizer = Lookahead(optimizer, inner_steps, 0.3, backend=backend)
    for step in range(steps):
        for evaluation in optimizer.evaluations():
            for p, slope in zip(params, slopes, strict=True):
                p.grad = 0.3 * p.detach() + (1 + 0.2 * ((step + evaluation.index) % 3)) * slope
    return torch.cat([p.detach().flatten() for p in params]).double().cpu()


def whole_steps(backend: str) -> str:
    worst = 0.0
    for base, settings in step_cases():
        expected = trained("cpu", "reference", base, settings, torch.float64)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 3 * 2e-6)):
            found = trained("cuda", backend, base, settings, dtype)
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= bound:
                raise AssertionError(f"{base[0].__name__} {settings} {dtype}: {error:.1e} > {bound:.1e}")
            worst = max(worst, error if dtype == torch.float32 else 0.0)
    return f"{len(step_cases())} settings, largest error in float32 {worst:.1e}"


def along(places: list[str], backend: str, base: Any, settings: dict[str, Any]) -> Tensor:
    """The weights after a step in each place that the model is moved to; without settings, torch's own steps."""
    torch.manual_seed(0)
    model, (make, own) = nn.Sequential(nn.Linear(70, 130), nn.Linear(130, 3)).double(), base
    optimizer = Lookbehind(model.parameters(), make, **settings, **own) if settings else make(model.parameters(), **own)
    for step, place in enumerate(places):
        model.to(place)
        if settings:
            optimizer.backend = "auto" if place == "cpu" else backend
        if make is torch.optim.RMSprop:  # a base that runs its own step has state that torch moves when it is loaded
            optimizer.load_state_dict(optimizer.state_dict())
        for index in (evaluation.index for evaluation in optimizer.evaluations()) if settings else (1,):
            for p in model.parameters():
                slope = torch.linspace(-1, 1 + step, p.numel(), dtype=p.dtype).view_as(p).to(place)
                p.grad = (0.3 + 0.1 * index) * p.detach() + slope
        if not settings:
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def moved(backend: str, there: str = "cuda") -> str:
    """As if it had stayed, with torch's own step and with Lookbehind's."""
    bases = [*BASES, (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5})]
    places = ["cpu", "cpu", there, there, "cpu", there]
    for base in bases:
        for settings, stays in (({"rho": 0.0, "k": 1, "alpha": 1.0}, {}), ({"k": 3, "alpha": "adaptive"},) * 2):
            found = along(places, backend, base, settings)
            expected = along(["cpu"] * len(places), "reference", base, stays)
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= 1e-12:
                raise AssertionError(f"{base[0].__name__} {settings}: {error:.1e} > 1e-12")
    return f"{len(bases)} bases"


def same_bits(backend: str) -> str:
    settings = {"k": 3, "alpha": "adaptive"}
    runs = [trained("cuda", backend, BASES[0], settings, torch.float32, steps=5) for _ in range(5)]
    if not all(torch.equal(run, runs[0]) for run in runs):
        raise AssertionError("five runs differ")
    return "5 runs"


def gradients(backend: str) -> str:
    from tests.kernels.gradients import far_apart, large, lazy_views

    lazy_views(backend, "cuda")
    far_apart(backend, "cuda")
    large(backend, "cuda")
    return "negated, conjugate; beta1 of 0, 0.25, 0.5, 0.9; up to 1e37"


def undone(backend: str) -> str:
    """Three steps of which the second is broken are the first and the third, to the last bit."""
    ways = list(itertools.product(BASES, (1, 2, 3), (0.6, "adaptive"), (torch.float32, torch.bfloat16), (False, True)))
    for base, k, alpha, dtype, average in ways:
        for broken in range(k + 1):
            found = []
            for steps in ((0, 1, 2), (0, 2)):
                norm = nn.BatchNorm1d(3).cuda()
                params = [nn.Parameter(torch.linspace(-1, 1, n, device="cuda").to(dtype)) for n in (5, 3000)]
                settings = {"backend": backend, "nonfinite": "skip", "buffers_at_slow": norm, "rho": 0.1, **base[1]}
                if average:
                    optimizer = MultistepSAM(params, base[0], k=k, average=True, **settings)
                else:
                    optimizer = Lookbehind(params, base[0], k=k, alpha=alpha, **settings)
                for step in steps:
                    slopes = [torch.linspace(step - 1, 2, p.numel(), device="cuda").to(dtype) for p in params]
                    inputs = torch.arange(12.0, device="cuda").view(4, 3) * (step + 1)
                    torch.cuda.set_sync_debug_mode("error" if step == 1 else "default")
                    for evaluation in optimizer.evaluations():
                        norm(inputs * (1 + evaluation.index))
                        for p, slope in zip(params, slopes, strict=True):
                            p.grad = 0.3 * p.detach() + slope * (1 + evaluation.index)
                        if step == 1 and evaluation.index == broken:
                            params[1].grad[-1].fill_(float("nan"))
                    skipped = optimizer.diagnostics["skipped"]
                    torch.cuda.set_sync_debug_mode("default")
                    if int(skipped) != (step == 1) or params[0].grad is not None:
                        raise AssertionError(f"step {step}, broken at {broken}: skipped {int(skipped)}")
                state = [value for entry in optimizer.state.values() for value in entry.values()]
                found.append([*params, *state, *norm.buffers()])
            for i, (a, b) in enumerate(zip(*found, strict=True)):
                if not torch.equal(a, b):
                    raise AssertionError(
                        f"{base[0].__name__}, k {k}, alpha {alpha}, {dtype}, broken {broken}: tensor {i}"
                    )
    return f"{len(ways)} settings, each evaluation of them"


def scaled(backend: str) -> str:
    """Four steps of which the second overflows are the other three, to the last bit; the scale is halved once."""
    ways = list(itertools.product(BASES, (1, 2, 3), (None, 2)))
    for base, k, inner_steps in ways:
        for broken in range(k + 1):
            found = []
            for steps in ((0, 1, 2, 3), (0, 2, 3)):
                params = [nn.Parameter(torch.linspace(-1, 1, n, device="cuda")) for n in (5, 3000)]
                scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=100)
                optimizer: Any = Lookbehind(params, base[0], k=k, rho=0.1, scaler=scaler, backend=backend, **base[1])
                if inner_steps:
                    optimizer = Lookahead(optimizer, inner_steps, 0.3)
                for step in steps:
                    overflows = [step == 1 and index == broken for index in range(k + 1)]

                    def closure(
                        params: Any = params, scaler: Any = scaler, step: int = step, overflows: Any = overflows
                    ) -> None:
                        loss = sum((0.15 * p.square() + (1 + step) * p).sum() for p in params)
                        scaler.scale(loss * float("inf") if overflows.pop(0) else loss).backward()

                    torch.cuda.set_sync_debug_mode("error" if step in (1, 2) else "default")
                    scaler.step(optimizer, closure)
                    scaler.update()
                    torch.cuda.set_sync_debug_mode("default")
                if scaler.get_scale() != (512 if 1 in steps else 1024):
                    raise AssertionError(f"{base[0].__name__}, k {k}, overflow at {broken}: {scaler.get_scale()}")
                state = [value for entry in optimizer.state.values() for value in entry.values()]
                found.append([*params, *state, torch.tensor(getattr(optimizer, "inner_step", 0))])
            for i, (a, b) in enumerate(zip(*found, strict=True)):
                if not torch.equal(a, b):
                    raise AssertionError(f"{base[0].__name__}, k {k}, overflow at {broken}, {inner_steps}: tensor {i}")
    return f"{len(ways)} settings, each evaluation of them"


def analysed(there: str = "cuda") -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    model.double().eval()
    batch, loss_fn = (torch.randn(64, 3, 8, 8).double(), torch.arange(64) % 5), nn.functional.cross_entropy
    found = []
    for device in ("cpu", there):
        model.to(device)
        figures = [
            analysis.sharpness(model, loss_fn, [batch], radii=[0.05, 0.5], m=16, adaptive=adaptive)
            for adaptive in (False, True)
        ]
        figures += [analysis.gradient_alignment(model, loss_fn, [batch], rho=0.05, k=3).flatten()]
        figures += [analysis.noise_robustness(model, [batch], levels=[0.0, 0.1]).flatten().double()]
        model.zero_grad()
        loss_fn(model(batch[0].to(device)), batch[1].to(device)).backward()
        figures += [torch.tensor(analysis.effective_perturbation(model, rho=0.05)).double()]
        found.append(torch.cat([x.cpu() for x in figures]))
    error = float((found[0] - found[1]).abs().max())
    if not error <= 1e-9:
        raise AssertionError(f"{found[0]} on the CPU, {found[1]} on the GPU")
    return f"{len(found[0])} figures, largest difference {error:.1e}"


def sanitized() -> str:
    """A sample of the passes on the CUDA kernels under compute-sanitizer, in a process of its own."""
    if not shutil.which("compute-sanitizer"):
        return "not looked for: there is no compute-sanitizer"
    code = "from tests.gpu_check import table_of_passes; print(table_of_passes('float32', 'cuda', sample=11))"
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"{tool}: {(done.stdout + done.stderr)[-2000:]}")
    return "memcheck, racecheck, synccheck"


# ---- without the host ------------------------------------------------------------------------------------------------


class Work:
    """An optimizer on the GPU with gradients given, always the same tensors."""

    def __init__(self, shapes: list[tuple[int, ...]], make: Callable[[list[nn.Parameter]], Any]) -> None:
        self.params = [nn.Parameter(torch.randn(s, device="cuda") * 0.05) for s in shapes]
        self.grads = [torch.randn(s, device="cuda") * 0.01 for s in shapes]
        self.optimizer = make(self.params)

    def step(self) -> None:
        for _ in self.optimizer.evaluations():
            for p, g in zip(self.params, self.grads, strict=True):
                p.grad = g


def fused(params: list[nn.Parameter], backend: str, **settings: Any) -> Lookbehind:
    return Lookbehind(params, torch.optim.SGD, lr=1e-3, momentum=0.9, backend=backend, **settings)


def no_synchronisation(backend: str) -> str:
    for settings in ({"k": 2}, {"k": 3, "alpha": "adaptive"}, {"k": 2, "max_grad_norm": 1.0}):
        work = Work([(300, 200), (77,)], lambda params, settings=settings: fused(params, backend, **settings))
        work.step()
        work.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "static, adaptive, clipped"


def graph_capture(backend: str) -> str:
    captured, eager = (Work([(300, 200), (77,)], lambda params: fused(params, backend, k=2)) for _ in range(2))
    for theirs, ours in zip([*eager.params, *eager.grads], [*captured.params, *captured.grads], strict=True):
        theirs.data.copy_(ours.data)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(4):
        graph.replay()
    for _ in range(7):  # what is captured is not run
        eager.step()
    for a, b in zip(captured.params, eager.params, strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"weights differ by {float((a - b).abs().max()):.1e}")
    return "3 steps, then 4 replays, as 7 steps"


def launches(backend: str) -> str:
    found = []
    for count in (1, 10_000):
        work = Work([(16,)] * count, lambda params: fused(params, backend, k=2))
        work.step()
        work.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work.step()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        found.append(len(kernels))
        if len(kernels) > 2 * 3:
            raise AssertionError(f"{count} tensors: {len(kernels)} for 3 evaluations: {[e.name for e in kernels][:12]}")
    return f"{found[0]} and {found[1]} a step of 3 evaluations, for 1 and 10,000 tensors"


# ---- fast ------------------------------------------------------------------------------------------------------------


def sets() -> dict[str, list[tuple[int, ...]]]:
    from benchmarks.bench.shapes import SETS

    chosen = {name: SETS[name] for name in ("small", "1000x256", "resnet34", "vit-b16")}
    return {**chosen, "flat 2e8": [(200_000_000,)]}


def own_work(shapes: list[tuple[int, ...]]) -> str:
    """Ratios of device time and of wall time, contenders in turn, and the bandwidth against a device copy's."""
    import torch._inductor.config

    from benchmarks.bench.bounds import bytes_per_parameter
    from benchmarks.bench.contenders import CONTENDERS
    from benchmarks.bench.settings import Settings
    from benchmarks.spread import ratios

    torch._inductor.config.loop_ordering_after_fusion = False  # torch 2.11 fails over the compiled peer with it
    settings, elements = Settings(), sum(torch.Size(s).numel() for s in shapes)
    names = [name for name in ("naive", "foreach", "compiled") if name != "compiled" or len(shapes) < 200]
    if elements > 1e8:
        names = ["foreach"]
    works = {name: Work(shapes, lambda params, name=name: CONTENDERS[name](params, settings)) for name in names}
    ours = [backend for backend in BACKENDS if not BACKENDS_BY_NAME[backend].why_not()]
    for backend in ours:
        works[backend] = Work(shapes, lambda params, backend=backend: fused(params, backend, k=2))
    x, y = (torch.ones(elements, device="cuda") for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {name: work.step for name, work in works.items()}
    runs["copy"] = lambda: y.copy_(x)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    repeats = {}
    for name, run in runs.items():
        measured(run, 3)  # compiles, allocates
        repeats[name] = max(1, min(100, int(0.03 / measured(run, 1))))
    for _ in range(9):
        for name, run in runs.items():
            seconds[name].append(measured(run, repeats[name]))
    parts = []
    copied = [8 * elements / s for s in seconds["copy"]]
    for backend in ours:
        for name in names:
            spread = ratios(seconds[name], seconds[backend])
            parts.append(f"{name} / {backend} {spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})")
        moved = [bytes_per_parameter(settings) * elements / s for s in seconds[backend]]
        parts.append(f"bandwidth of {backend} / copy {ratios(moved, copied).median:.2f}")
    return "; ".join(parts)


def measured(run: Callable[[], Any], repeats: int) -> float:
    """Seconds on the device of one of so many runs, the waits for the host between their launches counted in."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


if __name__ == "__main__":
    sys.exit(main())
