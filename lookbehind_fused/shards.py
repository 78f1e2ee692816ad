"""Parameters that are sharded over ranks: DTensors, as FSDP2 (``fully_shard``) and tensor parallelism make them.

To the kernels a DTensor is this rank's shard of it, plain memory. Only sums over all elements have to know of the other
ranks: norms, and what alpha* is made of. Each costs one all-reduce of a few float64, in which every rank has its part
in every sum, divided by how many ranks have the same part: an element that several ranks have counts once, and what is
not finite anywhere is so everywhere. So all ranks read the same numbers and decide the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import repeat
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .agreement import Agreement

UNIT = 32  # numbers: sums are padded to so many, so that ranks that differ in their buckets still talk of as many


def is_sharded(x: Any) -> bool:
    """Whether it is a DTensor. ``torch.distributed.tensor`` takes long to import, and is there if there is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Whether one of them is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(map(isinstance, tensors, repeat(module.DTensor)))


def shard(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, the same object at every call; any other tensor itself."""
    return x._local_tensor if is_sharded(x) else x  # type: ignore[attr-defined]


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of each its ``shard``."""
    tensors = [*tensors]
    return [*map(shard, tensors)] if any_sharded(tensors) else tensors


@torch.no_grad()
def placed_like(x: Tensor, p: Tensor) -> Tensor:
    """A gradient or state of a parameter, placed as that one is. A ``Partial`` gradient is reduced; of a plain tensor,
    the same on every rank, this rank's part is taken.
    """
    if not is_sharded(p):
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if not isinstance(x, DTensor):
        return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None)
    if x.placements != placements or x.device_mesh != mesh:
        x = x.redistribute(mesh, placements)
    return x


def shards_like(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """This rank's parts of gradients or states, placed as their parameters are."""
    found = [shard(placed_like(x, p)) for x, p in zip(tensors, params, strict=True)]
    return [x.wait() if hasattr(x, "wait") else x for x in found]  # of an AsyncCollectiveTensor


def whole(x: Tensor, p: Tensor) -> Tensor:
    """The DTensor, placed as ``p`` is, of which ``x`` is this rank's part, in the same memory; for a plain ``p``, ``x``
    itself.
    """
    if not is_sharded(p):
        return x
    from torch.distributed.tensor import DTensor

    # A DTensor takes over the storage offset of its part for a storage of its own, which could then not be copied.
    start, size = x.storage_offset() * x.itemsize, x.numel() * x.itemsize
    memory = x.untyped_storage()[start : start + size]
    part = torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, 0, x.shape, x.stride())
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


def swap(x: Tensor, y: Tensor) -> None:
    """Each becomes what the other was, and stays the same object."""
    torch._C._swap_tensor_impl(x, y)
    if is_sharded(x):
        for name in ("_spec", "_local_tensor"):
            mine, its = getattr(x, name), getattr(y, name)
            setattr(x, name, its)
            setattr(y, name, mine)


def any_of(x: Tensor) -> bool:
    """Whether any element is not 0; of a DTensor, on whichever rank."""
    return bool((x != 0).sum().full_tensor()) if is_sharded(x) else bool(x.any())  # type: ignore[attr-defined]


def placement(p: Tensor) -> tuple[Any, ...] | None:
    """How a tensor is spread over ranks, in words that all of these have in common; None for a plain one."""
    if not is_sharded(p):
        return None
    mesh = p.device_mesh  # type: ignore[attr-defined]
    return tuple(p.shape), tuple(mesh.shape), mesh.mesh_dim_names, p.placements  # type: ignore[attr-defined]


def unsuitable(p: Tensor) -> str | None:
    """What was expected of a parameter that is not acceptable, as far as that lies in how it is spread over ranks."""
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        return "no parameter of FullyShardedDataParallel, whose memory comes and goes; use fully_shard (FSDP2)"
    if not is_sharded(p):
        return None
    mesh = p.device_mesh  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None:
        return f"a device mesh that this rank is of, {torch.distributed.get_rank()}"
    if any(at.is_partial() for at in p.placements):  # type: ignore[attr-defined]
        return "a DTensor that is sharded or replicated, not Partial"
    if p.device.type != mesh.device_type:
        return f"its shard on the device of its mesh, {mesh.device_type}, without CPU offload"
    return None


# ---- sums over ranks -------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Over which ranks a tensor is spread, in order, and how many parts it has there: the others are replicas."""

    ranks: tuple[int, ...]
    parts: int


def spread_of(p: Tensor) -> Spread | None:
    """None for a plain tensor."""
    if not is_sharded(p):
        return None
    mesh = p.device_mesh  # type: ignore[attr-defined]
    sizes = (mesh.size(dim) for dim, at in enumerate(p.placements) if not at.is_replicate())  # type: ignore[attr-defined]
    return Spread(_ranks_of(mesh), prod(sizes))


@lru_cache(maxsize=64)
def _ranks_of(mesh: Any) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


class Ranks:
    """Adds up what buckets have found over ranks.

    Meshes within another one are served by its all-reduce, and so are plain tensors, of which every rank has all. Of
    meshes that only overlap, as the dimensions of one do, each has one of its own, and hands on to the next that there
    was something that is not finite, be it in one replica alone. After the last all ranks of the whole mesh know of it.

    Args:
        tensors: of each bucket one, with the ``Spread`` that all of them have.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spreads = [spread_of(p) for p in tensors]
        meshes = {s.ranks: p.device_mesh for s, p in zip(spreads, tensors, strict=True) if s is not None}  # type: ignore[attr-defined]
        largest = [ranks for ranks in meshes if not any({*ranks} < {*others} for others in meshes)]
        self.groups = [_group_of(meshes[ranks], ranks) for ranks in largest]
        self.sizes = [*map(len, largest)]
        self.served: list[list[tuple[int, float]]] = [[] for _ in largest]  # buckets, and what theirs are multiplied by
        for number, spread in enumerate(spreads):
            ranks, parts = spread or Spread((), 1)
            place = next(i for i, all_of_them in enumerate(largest) if {*ranks} <= {*all_of_them})
            self.served[place].append((number, parts / self.sizes[place]))
        self.agreement = Agreement({p.device for p in tensors})
        self.listens = True  # whether the next sums are the first of a step

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Ranks | None:
        """None where all are plain."""
        return Ranks(tensors) if any_sharded(tensors) else None

    def open(self) -> None:
        """A step begins.

        Raises:
            RuntimeError: in the last one ranks had said different things.
        """
        self.agreement.compare()
        self.listens = True

    def add_up(self, found: Sequence[Tensor], hands_on: bool = True) -> None:
        """Add up in place what each bucket has found, float64 of any shape.

        Args:
            hands_on: where there are several meshes, what is not finite in one bucket makes all NaN.

        Raises:
            RuntimeError: ranks have said different things, and this is the first of a step that shows it: at once where
                nothing has to be waited for, or where this rank has said something new; else when the next step begins.
        """
        hands_on = hands_on and len(self.groups) > 1
        for group, size, served in zip(self.groups, self.sizes, self.served, strict=True):
            device = found[served[0][0]].device
            parts = [
                self.agreement.numbers[device],
                *((found[n].reshape(-1) * weight).to(device) for n, weight in served),
            ]
            if hands_on:  # 0, or NaN
                parts.append(torch.stack([(x.sum() * 0).to(device) for x in found]).sum(0, keepdim=True))
            flat = torch.cat(parts)
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % UNIT))
            torch.distributed.all_reduce(flat, group=group)
            sums = flat.split([*map(Tensor.numel, parts), flat.numel() - sum(map(Tensor.numel, parts))])
            for (number, _), total in zip(served, sums[1:], strict=False):
                found[number].copy_(total.view_as(found[number]))
            for x in found if hands_on else ():
                x.add_(sums[-2].to(x.device))
            if self.listens:
                self.agreement.hear(size, sums[0])
        if self.listens:
            self.agreement.compare_if_due()
        self.listens = False


def _group_of(mesh: Any, ranks: tuple[int, ...]) -> Any:
    if mesh.ndim == 1:
        return mesh.get_group()
    world = torch.distributed.group.WORLD
    return world if len(ranks) == torch.distributed.get_world_size() else _new_group(ranks, world)


@lru_cache(maxsize=8)
def _new_group(ranks: tuple[int, ...], world: Any) -> Any:
    """Only its own ranks make it; ``world``: for as long as that one is."""
    return torch.distributed.new_group([*ranks], use_local_synchronization=True)
