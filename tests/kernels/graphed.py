"""Captured steps beside eager ones; without a GPU a double of the CUDA graph notes what runs, and runs it again.

For ``triton_cases`` and ``cuda_cases``, whose kernels are executed as compiled, and for ``tests.gpu``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lookbehind_fused import SAM, Lookahead, Lookbehind, MultistepSAM, graphs, open_step
from lookbehind_fused.kernels import device


def values(*shape: int, seed: int) -> Tensor:
    """Numbers of the size of one, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WAITS = ("item", "tolist", "cpu", "numpy", "synchronize", "pin_memory", "__bool__", "__float__", "__int__", "to")


class Tape(TorchFunctionMode):
    """Notes calls of torch and launches of kernels, and refuses what a graph cannot hold.

    Attributes:
        entries: what to call again, and the tensors that its results belong in.
        own: whether it is the optimizer that calls, which allocates nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self.own = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in ("__get__", "__set__") or (not results and name in ("requires_grad_", "increment_version")):
            return result
        if name in WAITS and not (name == "to" and results[0].data_ptr() == args[0].data_ptr()):
            raise AssertionError(f"{name} within a captured step")
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        fresh = [x for x in results if x.numel() and x.untyped_storage().data_ptr() not in given]
        if self.own and fresh and not (name in ("tensor", "clone") and fresh[0].dtype == torch.int64):  # the host's
            raise AssertionError(f"{name} allocates within a pass of a captured step")
        if results or name.endswith("_"):
            self.entries.append((lambda: func(*args, **kwargs), fresh))
        return result

    def launch(self, call: device.Call) -> None:
        """A call's kernels, which do not run before a replay: their tables are not uploaded yet."""
        self.entries.append((lambda: LAUNCH(call), []))

    def play(self) -> None:
        """All of it again, into the same memory."""
        for again, into in self.entries:
            results = [x for x in tree_leaves(again()) if isinstance(x, Tensor)]
            for x, y in zip(into, [x for x in results if x.numel()][: len(into)], strict=True):
                x.copy_(y)


LAUNCH: Callable[[device.Call], None] = device.Call.launch


class Double:
    """In the place of ``graphs.Graph``, on CPU tensors that are taken for a GPU's."""

    KIND = "cpu"

    def __init__(self, where: torch.device, pool: Any) -> None:
        self.tape = Tape()

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def capture(self, run: Callable[[], Any]) -> Any:
        use = open_step.OpenStep.use

        def own(step: Any, *args: Any) -> bool:
            self.tape.own = True
            try:
                return use(step, *args)
            finally:
                self.tape.own = False

        open_step.OpenStep.use, device.Call.launch = own, lambda call: self.tape.launch(call)
        try:
            with self.tape:
                return run()
        finally:
            open_step.OpenStep.use, device.Call.launch = use, LAUNCH

    def replay(self) -> None:
        with torch.no_grad():
            self.tape.play()


where = "cpu"  # the device


def use_double() -> None:
    """From now on steps are captured by the double, and CPU tensors are a GPU's: nothing is decided on the host."""
    global LAUNCH
    LAUNCH = device.Call.launch
    graphs.Graph = Double  # type: ignore[misc]
    open_step.on_host = lambda buckets, own_step: False


class Work:
    """Tensors with a closure that gives them gradients, at an address of their own each time.

    Args:
        make: of parameter groups, the optimizer.
    """

    def __init__(self, make: Callable[..., Any], backend: str, graphed: bool) -> None:
        shapes = [(5, 3), (33,), (1,), (130,)]
        self.params = [nn.Parameter(values(*shape, seed=n).to(where)) for n, shape in enumerate(shapes)]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.03, "adaptive": True}]
        self.optimizer = make(groups, backend=backend)
        self.targets = [torch.zeros(shape, device=where) for shape in shapes]
        self.scaler: Any = getattr(self.optimizer, "scaler", None)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        self.inner, self.graphed = inner, inner.graphed(self.closure) if graphed else None

    def closure(self, *evaluation: Any) -> Tensor:
        shift = 0.2 * evaluation[0].microbatch + 0.3 * (1 - evaluation[0].fraction) if evaluation else 0.0
        loss = torch.zeros((), device=where)
        scale = torch.ones((), device=where) if self.scaler is None else self.scaler._scale
        for n, (p, t) in enumerate(zip(self.params, self.targets, strict=True)):
            p.grad = ((p.detach() - t + shift) * (1 + 0.1 * n) + 0.2 * p.detach().sin()) * scale
            loss = loss + (p.detach() - t).square().sum()
        return loss

    def step(self, number: int, eager: bool = False) -> Tensor:
        for n, t in enumerate(self.targets):
            t.copy_(values(*t.shape, seed=100 * number + n))
        loss = self.graphed() if self.graphed and not eager else self.optimizer.step(self.closure)
        if self.scaler is not None:
            self.scaler.update()
        return loss.clone()


def lookahead(groups: Any, backend: str) -> Lookahead:
    return Lookahead(SAM(groups, torch.optim.SGD, lr=0.1, momentum=0.8, rho=0.2, backend=backend), k=2, alpha=0.4)


def scaled(groups: Any, backend: str) -> Lookbehind:
    scaler = torch.amp.GradScaler(where, init_scale=8.0, growth_interval=2)
    return Lookbehind(groups, torch.optim.SGD, lr=0.1, momentum=0.8, rho=0.2, scaler=scaler, backend=backend)


def of(method: Any, base: Any, **settings: Any) -> Callable[..., Any]:
    return lambda groups, backend: method(groups, base, backend=backend, **{"rho": 0.2, "lr": 0.05, **settings})


CASES: dict[str, Callable[..., Any]] = {
    "momentum": of(Lookbehind, torch.optim.SGD, momentum=0.8, weight_decay=0.02, k=2, alpha=0.4),
    "SGD": of(SAM, torch.optim.SGD),
    "Adam": of(Lookbehind, torch.optim.Adam, k=3, alpha="adaptive"),
    "AdamW": of(Lookbehind, torch.optim.AdamW, amsgrad=True, k=2, alpha="adaptive", alpha_scope="tensor"),
    "clipped": of(Lookbehind, torch.optim.SGD, momentum=0.8, k=2, max_grad_norm=0.3),
    "skip": of(Lookbehind, torch.optim.Adam, k=2, nonfinite="skip"),
    "m-SAM": of(Lookbehind, torch.optim.SGD, momentum=0.8, k=2, microbatches=2),
    "part": of(Lookbehind, torch.optim.SGD, momentum=0.8, k=2, ascent_fraction=0.25),
    "2k": of(Lookbehind, torch.optim.SGD, momentum=0.8, k=2, reuse_gradient=False),
    "multistep": of(MultistepSAM, torch.optim.SGD, momentum=0.8, k=2, average=True),
    "lookahead": lookahead,
    "scaled": scaled,
}


def on_device(groups: Any, backend: str) -> Lookbehind:
    """A learning rate that is a tensor, which no step waits for."""
    lr = torch.tensor(0.05, device=where)
    return Lookbehind(groups, torch.optim.Adam, lr=lr, capturable=True, k=2, rho=0.2, backend=backend)


def same(what: str, a: Tensor, b: Tensor) -> None:
    if not torch.equal(a, b):
        raise AssertionError(f"{what} differ by {float((a - b).abs().max()):.1e}")


def compare(what: str, ours: Work, theirs: Work) -> None:
    for n, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        same(f"{what}: weights of tensor {n}", p.detach(), q.detach())
    state, other = (work.optimizer.state_dict()["state"] for work in (ours, theirs))
    if state.keys() != other.keys():
        raise AssertionError(f"{what}: state of {[*state]} and {[*other]}")
    for n, entry in state.items():
        for name, value in entry.items():
            same(f"{what}: {name} of tensor {n}", value, other[n][name])
    for name, value in ours.inner.diagnostics.items():
        same(f"{what}: {name}", value, theirs.inner.diagnostics[name])


def walk(name: str, backend: str, start: int) -> None:
    """Replay, replay, an eager step, replay, another lr and rho, replay, as the same steps do that are all eager.

    Args:
        start: how many steps both take before the capture, which leaves everything as it was.
    """
    ours, theirs = (Work(CASES[name], backend, graphed=False) for _ in range(2))
    for number in range(start):
        same(f"loss of step {number}", ours.step(number), theirs.step(number))
    ours.graphed = ours.inner.graphed(ours.closure, num_warmup_iters=1 + start)
    compare("the capture", ours, theirs)
    for number in range(10, 18):
        if number == 14:
            for work in (ours, theirs):
                for group in work.inner.param_groups:
                    group["lr"] *= 0.7
                    group["rho"] *= 1.5
        if number == 16:  # cleared state begins anew
            ours.optimizer.state.clear()
            theirs.optimizer.state.clear()
        loss = ours.step(number, eager=number in (12, 15))
        same(f"loss of step {number}", loss, theirs.step(number))
        compare(f"step {number}", ours, theirs)


def overflows(backend: str) -> None:
    """A gradient that is not finite undoes a replay, and the scaler hears of it."""
    ours, theirs = (Work(scaled, backend, graphed=n == 0) for n in range(2))
    for number in range(5):
        for work in (ours, theirs):
            work.targets[1].fill_(0)
        before = ours.params[1].detach().clone()
        broken = number == 2
        for work in (ours, theirs):
            for n, t in enumerate(work.targets):
                t.copy_(values(*t.shape, seed=100 * number + n))
            if broken:
                work.targets[1][3] = torch.inf
            work.graphed() if work.graphed else work.optimizer.step(work.closure)
            work.scaler.update()
        same(f"scale after step {number}", ours.scaler._scale, theirs.scaler._scale)
        compare(f"step {number}", ours, theirs)
        if broken != torch.equal(before, ours.params[1].detach()):
            raise AssertionError(f"step {number}")


def refused(backend: str) -> None:
    """What has changed that is captured: an error, weights as they were, and the way out works."""
    work = Work(CASES["momentum"], backend, graphed=True)
    work.step(0)

    def refuses(match: str, error: type[Exception] = RuntimeError) -> None:
        before = [p.detach().clone() for p in work.params]
        try:
            work.step(1)
        except error as raised:
            if match not in str(raised):
                raise
        else:
            raise AssertionError(f"nothing was raised: {match}")
        for p, w in zip(work.params, before, strict=True):
            same(match, p.detach(), w)
        if work.optimizer.evaluation is not None:
            raise AssertionError("a step is open")

    work.optimizer.k = 3
    refuses("expected the settings that a step is made of")
    work.optimizer.k = 2
    work.step(1)
    work.optimizer.alpha = "adaptive"
    refuses("expected the settings that a step is made of")
    work.optimizer.alpha = 0.4
    work.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, device=where))]})
    refuses("expected the parameters and their groups")
    del work.optimizer.param_groups[-1]
    refuses("call graphed(closure) again")
    work.graphed = work.optimizer.graphed(work.closure)
    work.step(2)
    work.params[0].data = work.params[0].data.clone()
    refuses("expected the parameters' places in memory")
    work.graphed = work.optimizer.graphed(work.closure)
    work.step(2)
    for p in work.params:
        p.grad = torch.ones_like(p)
    refuses("gradients: expected none, or the last step's")
    work.optimizer.zero_grad()
    work.optimizer.param_groups[0]["rho"] = -1.0
    refuses("rho", ValueError)
    work.optimizer.param_groups[0]["rho"] = 0.2
    work.step(3)


def on_gpu(backend: str, device: str = "cuda", backward: bool = True) -> str:
    """All cases with CUDA's own graphs, and a model's backward passes under autocast.

    Args:
        device: "cpu" after ``use_double``.
        backward: whether backward passes are captured, which the double does not see: otherwise that model's steps are
            all eager.
    """
    global where
    where = device
    CASES["lr on the device"] = on_device
    cases = table(backend)
    for name, case in cases.items():
        try:
            case()
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error
    trains(backend, backward)
    return f"{len(cases)} walks of 8 steps, replayed and eager, have the same bits; a model trains as without a graph"


def trains(backend: str, backward: bool) -> None:
    """Forward and backward passes in bfloat16, BatchNorm's statistics, a schedule."""
    models, losses = [], []
    for graphed in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5)]
        model = nn.Sequential(*layers).to(where)
        x, y = torch.zeros(32, 20, device=where), torch.zeros(32, dtype=torch.long, device=where)
        optimizer = Lookbehind(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1, k=2, backend=backend)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

        def closure(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            with torch.autocast(where, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

        step = optimizer.graphed(closure) if graphed and backward else partial(optimizer.step, closure)
        for number in range(8):
            x.copy_(values(32, 20, seed=number))
            y.copy_((values(32, 20, seed=number)[:, :5]).argmax(1))
            losses.append(step().clone())
            schedule.step()
        models.append(model)
    for n, (a, b) in enumerate(zip(losses[:8], losses[8:], strict=True)):
        same(f"loss of step {n}", a, b)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        same(name, a, b)


def table(backend: str) -> dict[str, Callable[[], None]]:
    """All cases by name."""
    return {
        **{
            f"{name} after {start}": partial(walk, name, backend, start)
            for number, name in enumerate(CASES)
            for start in ((0, 2) if number % 2 else (1, 2) if name == "scaled" else (0, 1))
        },
        "overflows": partial(overflows, backend),
        "refused": partial(refused, backend),
    }


def report(backend: str, chosen: Sequence[str]) -> int:
    """Run all cases, or those that have one of the parts of names; 0 if every one passes."""
    use_double()
    ran = failed = 0
    for name, case in table(backend).items():
        if chosen and not any(part in name for part in chosen):
            continue
        ran += 1
        try:
            case()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}"[:2000])
    print(f"{ran} cases, {failed} failed")
    return int(failed > 0 or ran == 0)
