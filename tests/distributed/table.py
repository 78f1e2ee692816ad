"""The table: arrangements of a model over ranks, times methods, times bases, against one process."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lookbehind_fused import SAM, Lookahead, Lookbehind, MultistepSAM
from tests.conftest import BACKENDS
from tests.twin import values

STEPS = 5
TOLERANCE = 1e-10

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.02}),
    "Adam": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.02}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}


def lookahead(params: Any, base: Any, **settings: Any) -> Lookahead:
    return Lookahead(SAM(params, base, rho=0.2, **settings), k=2, alpha=0.4)


# name: what makes the optimizer, how many small all-reduces a step takes
METHODS: dict[str, tuple[Callable[..., Any], int]] = {
    "SAM": (partial(SAM, rho=0.2), 1),
    "ASAM": (partial(SAM, rho=0.5, adaptive=True), 1),
    "k=1": (partial(Lookbehind, k=1, alpha=0.4, rho=0.2), 1),
    "k=2": (partial(Lookbehind, k=2, alpha=0.4, rho=0.2), 2),
    "k=3": (partial(Lookbehind, k=3, alpha=0.4, rho=0.2, adaptive=True), 3),
    "global": (partial(Lookbehind, k=3, alpha="adaptive", rho=0.2), 4),
    "tensor": (partial(Lookbehind, k=3, alpha="adaptive", alpha_scope="tensor", rho=0.2), 4),
    "clipped": (partial(Lookbehind, k=2, rho=0.2, max_grad_norm=0.1), 3),
    "skip": (partial(Lookbehind, k=2, rho=0.2, nonfinite="skip"), 3),
    "2k": (partial(Lookbehind, k=2, rho=0.2, reuse_gradient=False), 2),
    "m-SAM": (partial(Lookbehind, k=2, rho=0.2, microbatches=2), 4),
    "multistep": (partial(MultistepSAM, k=2, rho=0.2, average=True), 2),
    "free": (partial(Lookbehind, k=2, rho=0.2, ascent_gradient="previous"), 2),
    "lookahead": (lookahead, 1),
}


# ---- arrangements ----------------------------------------------------------------------------------------------------


def make_model() -> nn.Sequential:
    """Over two ranks 5 rows are uneven, and one row leaves the second none."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)]
    return nn.Sequential(*layers).double()


def mesh_of(*sizes: int, names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def shard_layers(model: nn.Sequential, mesh: DeviceMesh) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# Each returns the model, over how many ranks the minibatch is shared out, and which part of it this rank has.
Arranged = tuple[nn.Module, int, int]


def ddp(model: nn.Sequential) -> Arranged:
    return DistributedDataParallel(model), dist.get_world_size(), dist.get_rank()


def fsdp(model: nn.Sequential) -> Arranged:
    return shard_layers(model, mesh_of(dist.get_world_size(), names=("dp",))), dist.get_world_size(), dist.get_rank()


def tensor_parallel(model: nn.Sequential) -> Arranged:
    """The last layer is plain, and so are its gradients the same on all ranks."""
    mesh = mesh_of(dist.get_world_size(), names=("tp",))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}), 1, 0


def mixed(model: nn.Sequential) -> Arranged:
    """A mesh for the first layer, another one for the second, and the last is plain."""
    fully_shard(model[0], mesh=mesh_of(dist.get_world_size(), names=("dp",)))
    tp = mesh_of(dist.get_world_size(), names=("tp",))
    parallelize_module(model[2], tp, ColwiseParallel(output_layouts=Replicate()))
    return model, 1, 0


def hybrid(model: nn.Sequential) -> Arranged:
    """HSDP: two replicas, each of two shards."""
    mesh = mesh_of(2, 2, names=("replicate", "shard"))
    return shard_layers(model, mesh), 4, dist.get_rank()


def fsdp_and_tp(model: nn.Sequential) -> Arranged:
    """The last layer is spread over a part of the mesh only."""
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return shard_layers(model, mesh["dp"]), 2, mesh["dp"].get_local_rank()


def crossed(model: nn.Sequential) -> Arranged:
    """Each rank has another two ranks beside it for the first layer than for the second: neither mesh serves both."""
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    fully_shard(model[0], mesh=mesh["dp"])
    parallelize_module(model[2], mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
    return model, 1, 0


ARRANGEMENTS: dict[int, dict[str, Callable[[nn.Sequential], Arranged]]] = {
    2: {"ddp": ddp, "fsdp": fsdp, "tp": tensor_parallel, "mixed": mixed},
    4: {"hsdp": hybrid, "fsdp+tp": fsdp_and_tp, "crossed": crossed},
}


# ---- one run ---------------------------------------------------------------------------------------------------------


class Run:
    """A model with an optimizer.

    Args:
        sharers, part: over how many ranks a minibatch is shared out, and which part is taken here.
    """

    def __init__(
        self, model: nn.Module, make: Callable[..., Any], base: str, backend: str, sharers: int = 1, part: int = 0
    ) -> None:
        self.model, self.sharers, self.part = model, sharers, part
        base_class, settings = BASES[base]
        self.params = list(model.parameters())
        groups = [{"params": self.params[:1]}, {"params": self.params[1:]}]
        self.optimizer = make(groups, base_class, backend=backend, **settings)
        self.steps, self.breaks, self.dtype = 0, False, torch.float64

    def batch(self) -> Tensor:
        """Of two microbatches of 8 examples each this rank's examples."""
        x = values(16, 3, seed=self.steps, dtype=self.dtype)
        return x.view(2, self.sharers, -1, 3)[:, self.part].reshape(-1, 3)

    def step(self) -> None:
        """One step; ``breaks``: the second gradient has a NaN, of a DTensor on one rank."""
        count = itertools.count()

        def closure(*evaluation: Any) -> Tensor:
            x = self.batch()
            x = evaluation[0].part(x) if evaluation else x
            loss = (self.model(x).squeeze(-1) - x.sin().sum(-1)).square().mean()
            loss.backward()
            grad = self.params[0].grad
            if self.breaks and next(count) == 1:
                if not isinstance(grad, DTensor):
                    grad[0] = torch.nan
                elif dist.get_rank() == dist.get_world_size() - 1:
                    grad.to_local()[0] = torch.nan
            return loss.detach()

        self.optimizer.step(closure)
        self.steps += 1


class Collectives:
    """Counts the all-reduces that somebody calls by name: this library's, and those of gradients in HSDP."""

    def __enter__(self) -> "Collectives":
        self.sizes: list[int] = []
        self._own = dist.all_reduce
        dist.all_reduce = self._counted
        return self

    def _counted(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sizes.append(tensor.numel())
        return self._own(tensor, *args, **kwargs)

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self._own


def full(p: Tensor) -> Tensor:
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def as_one_process(arrange: Callable[[nn.Sequential], Arranged], method: str, base: str, backend: str) -> None:
    """Weights after some steps, diagnostics, and the number of small all-reduces."""
    make, reductions = METHODS[method]
    one = Run(make_model(), make, base, backend)
    many = Run(*(arranged := arrange(make_model()))[:1], make, base, backend, *arranged[1:])
    sharded = any(isinstance(p, DTensor) for p in many.params)
    for step in range(STEPS):
        one.breaks = many.breaks = method == "skip" and step == 2
        one.step()
        with Collectives() as collectives:
            many.step()
        if arrange is not hybrid and not one.breaks and (step or method != "free"):
            meshes = 2 if arrange is crossed else int(sharded)
            assert len(collectives.sizes) == reductions * meshes, collectives.sizes
        for name, value in one.optimizer.diagnostics.items():
            found = many.optimizer.diagnostics[name]
            assert torch.allclose(found.double(), value.double(), 0, TOLERANCE, equal_nan=True), f"{name}: {found}"
    for (name, p), q in zip(one.model.named_parameters(), many.params, strict=True):
        difference = (full(q) - p).abs().max().item()
        assert difference <= TOLERANCE, f"{name}: {difference:.1e}"


def bases_as_one_process(arrange: Callable[[nn.Sequential], Arranged], method: str) -> None:
    """With each base, on each backend in turn."""
    for number, base in enumerate(BASES):
        backend = BACKENDS[(number + len(method)) % len(BACKENDS)]
        try:
            as_one_process(arrange, method, base, backend)
        except Exception as error:
            raise AssertionError(f"{base} on {backend}") from error


def cases(ranks: int) -> dict[str, Callable[[], None]]:
    """By their names."""
    return {
        f"{name}-{method}": partial(bases_as_one_process, arrange, method)
        for name, arrange in ARRANGEMENTS[ranks].items()
        for method in METHODS
    }
