"""Captured steps: one CUDA graph of a whole outer step, forward and backward passes included.

A graph replays launches on the addresses that they had. So it has tables of addresses of its own, beside those of eager
steps; what they hold is uploaded once, after the capture. What may change from step to step is read from memory that
is written before a replay: ``hyper`` (lr, rho, alpha, ...), the base's state, the scale of the loss. What a graph
cannot do is done around it: hooks, the verdict for a scaler, Lookahead's count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from .buckets import Bound, Bucket
from .kernels.device import Uploads
from .lowering import DESCENDED
from .open_step import CLOSING, OPEN, OpenStep
from .parts.buffers import BuffersAtSlow, Copy, put_back
from .rules import NO_RULE
from .shards import any_sharded
from .tensors import tensors_of

if TYPE_CHECKING:
    from .forms import Forms


class Graph:
    """A CUDA graph. Tests have one of their own in its place."""

    KIND = "cuda"  # of devices

    def __init__(self, device: torch.device, pool: Any) -> None:
        self.device, self.pool = device, pool
        self.graph = torch.cuda.CUDAGraph()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run something on the side, as capturing does."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def capture(self, run: Callable[[], Any]) -> Any:
        """Note the launches of something, which do not take place; what it returns."""
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, pool=self.pool):
            return run()

    def replay(self) -> None:
        """Launch them."""
        self.graph.replay()


class _Captured(NamedTuple):
    """What a bucket was when the step was captured.

    Attributes:
        key: program, traits and flags. memory: that of its parameters. bound: its calls, with their tables.
        joined: the tensors that take part.
    """

    bucket: Bucket
    key: tuple[Any, ...]
    memory: list[Tensor]
    bound: dict[tuple[int, ...], Bound]
    joined: tuple[int, ...]


def _key(bucket: Bucket) -> tuple[Any, ...]:
    return () if bucket.key is None else bucket.key[:3]


def _put_back(kept: dict[Bucket, dict[tuple[int, ...], Bound]]) -> None:
    for bucket, bound in kept.items():
        bucket.bound_for = bound


class GraphedStep:
    """One outer step, captured: calling it replays it (``Lookbehind.graphed``).

    ``lr``, ``rho`` and whatever else a schedule changes may have changed, with k, the program and the parameters as
    they were; eager steps may come between. Hooks run, ``diagnostics``, ``state_dict()``, a scaler and ``Lookahead``
    are as after any step. ``.grad`` is that of the last evaluation, in memory of the graph.
    """

    def __init__(self, optimizer: Forms, closure: Callable[..., Any], num_warmup_iters: int, pool: Any) -> None:
        self._optimizer = optimizer
        with ExitStack() as stack:
            stack.enter_context(_nothing_happens(optimizer))
            step = optimizer._prepare(optimizer.reuse_gradient)
            _check_capturable(optimizer, step)
            self._graph = Graph(step.buckets[0].device, pool)
            kept = {bucket: bucket.bound_for for bucket in step.buckets}
            stack.callback(_put_back, kept)
            for bucket in step.buckets:
                bucket.bound_for = {}
            self._capture(closure, num_warmup_iters)

    def _capture(self, closure: Callable[..., Any], num_warmup_iters: int) -> None:
        optimizer = self._optimizer

        def begun() -> OpenStep:
            """What is not captured is not in its parts."""
            step = optimizer._prepare(optimizer.reuse_gradient)
            step.parts = [part for part in step.parts if isinstance(part, BuffersAtSlow)]
            for p in optimizer._prepared.tensors:
                p.grad = None
            return step

        for _ in range(num_warmup_iters):
            self._graph.warm_up(lambda: optimizer._run(begun(), closure))
        step = begun()
        for bucket in step.buckets:
            bucket.open()
        step.opened = True
        scale = step.loss_scale
        if isinstance(scale, Tensor):  # replays read it here
            step.loss_scale = scale = scale.detach().clone()
        try:
            with Uploads.put_off():
                self._loss = self._graph.capture(lambda: optimizer._run(step, closure))
        except Exception as error:
            first: BaseException = error
            while first.__context__ is not None:  # after which nothing else could be captured either
                first = first.__context__
            raise RuntimeError(
                f"graphed(): expected a closure that can be captured, but {type(first).__name__}: {first}. Within a "
                "captured step nothing may wait for the device (.item(), .cpu(), printing a tensor), and a compiled "
                "model may not capture graphs of its own (torch.compile(mode='reduce-overhead'))"
            ) from error
        self._scale, self._norms = scale, step.norms
        self._buckets = [_Captured(b, _key(b), b.memory, b.bound_for, b.joined) for b in step.buckets]
        self._grads = [(p, p.grad) for p in optimizer._prepared.tensors]

    def __call__(self) -> Any:
        """Replay it.

        Returns:
            What the closure has returned at evaluation 0: the same tensor at each call, which the next one overwrites.

        Raises:
            RuntimeError: something has changed that is captured: parameters, k, the kind of alpha, ...; there are
                gradients that the step would lose; or as ``step()``.
        """
        optimizer = self._optimizer
        step = optimizer._prepare_with_hooks(optimizer.reuse_gradient)
        self._check(step)
        if isinstance(self._scale, Tensor) and isinstance(step.loss_scale, Tensor):
            self._scale.copy_(step.loss_scale, non_blocking=True)
        replayed = _Replayed(step, self._norms)
        optimizer._guarded(replayed, self._replay, replayed)
        optimizer._run_post_hooks()
        return self._loss

    @torch.no_grad()
    def _replay(self, step: OpenStep) -> None:
        optimizer = self._optimizer
        optimizer._now.open = step
        step.begin()
        for one in self._buckets:
            one.bucket.joined = one.joined
        self._graph.replay()
        step.phase = CLOSING
        increment_version(optimizer._prepared.tensors)
        optimizer._elsewhere.written()
        for p, grad in self._grads:
            p.grad = grad
        step.commit()
        optimizer._closed(step)

    def _check(self, step: OpenStep) -> None:
        """Refuse to replay what is no longer what was captured, before anything moves."""
        changed = None
        if [*map(id, step.buckets)] != [id(one.bucket) for one in self._buckets]:
            changed = "the parameters and their groups"
        elif any(one.bucket.memory is not one.memory for one in self._buckets):
            changed = "the parameters' places in memory"
        elif any(_key(one.bucket) != one.key for one in self._buckets):
            changed = "the settings that a step is made of (k, adaptive alpha, clipping, skipping, the base's flags)"
        elif isinstance(step.loss_scale, Tensor) != isinstance(self._scale, Tensor):
            changed = "whether the loss is scaled"
        if changed:
            raise RuntimeError(f"graphed(): expected {changed} to be those of the capture; call graphed(closure) again")
        optimizer = self._optimizer
        if optimizer._leftovers.others(optimizer._prepared.tensors):
            raise RuntimeError(
                "gradients: expected none, or the last step's, when a captured step is replayed, since it makes its "
                "own; call zero_grad() before it"
            )


class _Replayed(OpenStep):
    """A step whose calls are a graph's."""

    def __init__(self, step: OpenStep, norms: Any) -> None:
        vars(self).update(vars(step))
        self.norms = norms
        self.parts = [part for part in step.parts if not isinstance(part, BuffersAtSlow)]  # which is captured

    def settle(self) -> None:
        """An interrupt may come between a replay and the note of it: the device knows."""
        if self.phase == OPEN and not self.broken and all(bool(bucket.done[DESCENDED]) for bucket in self.buckets):
            self.phase = CLOSING
        super().settle()


def _check_capturable(optimizer: Forms, step: OpenStep) -> None:
    """Refuse what a graph cannot hold.

    Raises:
        ValueError: naming it, what was expected and what came.
    """
    prepared = optimizer._prepared
    devices = {p.device for p in prepared.tensors}
    if any_sharded(prepared.tensors):
        raise ValueError("graphed(): expected plain tensors, got a DTensor; call step(closure)")
    if len(devices) > 1 or next(iter(devices)).type != Graph.KIND:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"graphed(): expected parameters on one CUDA device, got {found}; call step(closure)")
    if not all(bucket.kernels.SCALARS_ON_DEVICE for bucket in step.buckets):
        raise ValueError(f"backend: expected 'triton' or 'cuda' for graphed(), got {optimizer.backend!r}")
    if prepared.rule is NO_RULE:
        raise ValueError(
            "base_optimizer: expected SGD, Adam or AdamW for graphed(), got "
            f"{type(optimizer.base_optimizer).__name__}, whose own step() may wait for the device"
        )
    for name, usual in (("ascents", "synced"), ("ascent_gradient", "current"), ("same_randomness", False)):
        if getattr(optimizer, name) != usual:
            raise ValueError(f"{name}: expected {usual!r} for graphed(), got {getattr(optimizer, name)!r}")
    if optimizer._elsewhere.hooks:
        raise ValueError("graphed(): expected no weights hook, since none runs within a graph; remove it")


@contextmanager
def _nothing_happens(optimizer: Forms) -> Iterator[None]:
    """What runs within the block leaves everything as it was."""
    optimizer.require_closed("graphed()")
    prepared, now, base = optimizer._prepared, optimizer._now, optimizer.base_optimizer
    before = [(p, p.detach().clone(), p.grad) for p in tensors_of(base.param_groups)]
    state = {
        p: {key: (x, x.detach().clone() if isinstance(x, Tensor) else x) for key, x in entry.items()}
        for p, entry in base.state.items()
    }
    figures = [x for b in prepared.buckets for x in (b.sums, b.hyper)]
    figures += prepared.norms.tensors if prepared.buckets else []
    figures_before = [x.clone() for x in figures]
    last, called, cached = now.last, optimizer._opt_called, torch.is_autocast_cache_enabled()
    buffers: dict[nn.Module, list[Copy]] = {}

    def note(module: nn.Module, _: Any) -> None:
        """Called before a module runs for the first time."""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise RuntimeError("graphed(): expected a model without DistributedDataParallel; call step(closure)")
        if module not in buffers:
            named = module._buffers.items()
            buffers[module] = [Copy(module, k, b, None if b is None else b.detach().clone()) for k, b in named]

    noting = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        torch.set_autocast_cache_enabled(False)
        with torch.random.fork_rng({p.device for p, *_ in before if p.is_cuda}, device_type="cuda"):
            yield
    finally:
        noting.remove()
        torch.set_autocast_cache_enabled(cached)
        now.open, now.last, optimizer._opt_called = None, last, called
        with torch.no_grad():
            for p, weights, grad in before:
                p.copy_(weights)
                p.grad = grad
            if figures:
                torch._foreach_copy_(figures, figures_before)
            for copies in buffers.values():
                put_back(copies)
            for p in [p for p in base.state if p not in state]:
                del base.state[p]
            for p, entry in state.items():
                for key in base.state[p].keys() - entry.keys():
                    del base.state[p][key]
                for key, (x, copy) in entry.items():
                    base.state[p][key] = x.copy_(copy) if isinstance(x, Tensor) else copy
        prepared.read_again()
        optimizer._elsewhere.written()
