"""Checkpoints that reshard: saved in one arrangement of the model over ranks, loaded in another, and by plain torch."""

import copy
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lookbehind_fused import Lookbehind
from tests.distributed.table import ARRANGEMENTS, BASES, METHODS, Run, full, make_model, mesh_of, shard_layers

TOLERANCE = 1e-12
METHOD = partial(Lookbehind, k=2, alpha=0.4, rho=0.2)


@contextmanager
def shared_folder() -> Iterator[str]:
    """The same one on each rank."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    try:
        yield made[0]
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(made[0])


def in_place(arrangement: str) -> nn.Module:
    """A new model in an arrangement, of which each rank is given the whole minibatch."""
    if arrangement == "one":
        return make_model()
    return ARRANGEMENTS[dist.get_world_size()][arrangement](make_model())[0]


def run_in(arrangement: str, base: str, make: Callable[..., Any] = METHOD, steps: int = 0) -> Run:
    run = Run(in_place(arrangement), make, base, "native")
    for _ in range(steps):
        run.step()
    return run


def continue_alike(*runs: Run, steps: int = 3) -> None:
    for run in runs:
        run.steps = 3
        for _ in range(steps):
            run.step()
    for p, *others in zip(*(run.params for run in runs), strict=True):
        expected = full(p)  # once: some ranks may have fewer runs than others
        for q in others:
            difference = (expected - full(q)).abs().max().item()
            assert difference <= TOLERANCE, f"{difference:.1e}"


def save(run: Run, folder: str, **options: Any) -> None:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, **options)


def load(run: Run, folder: str, **options: Any) -> None:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder, **options)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def reshards(source: str, target: str) -> None:
    """With each base: into a new optimizer, or into one that has trained on something else."""
    for number, base in enumerate(BASES):
        before, after = run_in(source, base, steps=3), run_in(target, base)
        after.steps = 10
        for _ in range(2 * (number % 2)):
            after.step()
        after.optimizer.zero_grad()
        with shared_folder() as folder:
            save(before, folder)
            load(after, folder)
        for p, q in zip(before.params, after.params, strict=True):
            state, loaded = before.optimizer.state[p], after.optimizer.state[q]
            assert set(state) == set(loaded)
            for name, value in state.items():
                assert not isinstance(q, DTensor) or name == "step" or loaded[name].placements == q.placements
                assert torch.equal(full(value), full(loaded[name])), name
        continue_alike(before, after)


def plain_torch_takes_it(source: str) -> None:
    """The state of a step's base, into a torch optimizer of one process, and from there back again."""
    for base, (base_class, settings) in BASES.items():
        before = run_in(source, base, steps=3)
        plain = make_model()
        params = list(plain.parameters())
        optimizer = base_class([{"params": params[:1]}, {"params": params[1:]}], **settings)
        with shared_folder() as folder:
            save(before, folder)
            model, state = get_state_dict(plain, optimizer)
            dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
            set_state_dict(plain, optimizer, model_state_dict=model, optim_state_dict=state)
        for p, q in zip(before.params, params, strict=True):
            assert torch.equal(full(p), q)
            for name, value in before.optimizer.state[p].items():
                assert torch.equal(full(value), optimizer.state[q][name]), name
        after = run_in(source, base)
        after.model.load_state_dict(before.model.state_dict())
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(
            after.model, after.optimizer, get_optimizer_state_dict(plain, optimizer), options=options
        )
        continue_alike(before, after)


def by_its_own_state_dict(arrangement: str) -> None:
    """On the same ranks: as a dict, through a file, as a copy, and as plain tensors that are the same on every rank."""
    for base in BASES:
        before = run_in(arrangement, base, steps=3)
        saved = before.optimizer.state_dict()
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        whole = copy.copy(saved)
        whole["state"] = {
            i: {name: full(value) for name, value in entry.items()} for i, entry in saved["state"].items()
        }
        runs = []
        for state_dict in (saved, torch.load(file, weights_only=False), whole):
            run = run_in(arrangement, base)
            run.model.load_state_dict(before.model.state_dict())
            run.optimizer.load_state_dict(state_dict)
            runs.append(run)
        continue_alike(before, *runs)


def copies_of_its_own(method: str) -> None:
    """Lookahead's slow weights and the gradients of the step before, beside what torch saves."""
    entry = {"lookahead": "lookahead", "free": "lookbehind"}[method]
    make = METHODS[method][0]
    for source, target in (("fsdp", "one"), ("one", "fsdp"), ("mixed", "fsdp")):
        before, after = run_in(source, "Adam", make, 3), run_in(target, "Adam", make, 1)
        own, its = (run.optimizer.state_dict()[entry] for run in (before, after))
        with shared_folder() as folder:
            dcp.save({"own": own}, checkpoint_id=folder + "/own")
            dcp.load({"own": its}, checkpoint_id=folder + "/own")
            save(before, folder + "/rest")
            load(after, folder + "/rest")
        after.optimizer.load_state_dict({**after.optimizer.state_dict(), entry: its})
        name = {"lookahead": "slow", "free": "previous"}[method]
        for mine, other, p in zip(own[name], after.optimizer.state_dict()[entry][name], after.params, strict=True):
            assert torch.equal(full(mine), full(other))
            assert not isinstance(p, DTensor) or other.placements == p.placements
        continue_alike(before, after)


def on_fewer_ranks() -> None:
    """Saved on four, loaded on the first two of them, on one, and from there on four again."""
    two, own_group = DeviceMesh("cpu", [0, 1]), dist.new_group([0, 1])
    for base in BASES:
        before = Run(shard_layers(make_model(), mesh_of(4, names=("dp",))), METHOD, base, "native")
        for _ in range(3):
            before.step()
        with shared_folder() as folder:
            save(before, folder)
            runs = [run_in("one", base)]
            load(runs[0], folder)
            if dist.get_rank() < 2:
                runs.append(Run(shard_layers(make_model(), two), METHOD, base, "native"))
                load(runs[1], folder, process_group=own_group)
                save(runs[1], folder + "/two", process_group=own_group)
            dist.barrier()
            runs.append(Run(shard_layers(make_model(), mesh_of(4, names=("dp",))), METHOD, base, "native"))
            load(runs[-1], folder + "/two")
            continue_alike(before, *runs)


CASES: dict[int, dict[str, Callable[[], None]]] = {
    2: {
        **{
            f"saved-{source}-{target}": partial(reshards, source, target)
            for source, target in (("fsdp", "one"), ("one", "fsdp"), ("tp", "fsdp"), ("fsdp", "mixed"))
        },
        **{f"saved-{source}-torch": partial(plain_torch_takes_it, source) for source in ("fsdp", "tp")},
        **{f"state-dict-{name}": partial(by_its_own_state_dict, name) for name in ("fsdp", "mixed")},
        **{f"saved-{method}": partial(copies_of_its_own, method) for method in ("lookahead", "free")},
    },
    4: {
        "saved-four-two-one": on_fewer_ranks,
        "saved-fsdp+tp-hsdp": partial(reshards, "fsdp+tp", "hsdp"),
        "saved-one-fsdp+tp": partial(reshards, "one", "fsdp+tp"),
        "state-dict-hsdp": partial(by_its_own_state_dict, "hsdp"),
    },
}
