"""Ranks that disagree, gradients and parameters of all kinds, steps that do not happen: on two ranks, or four."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lookbehind_fused import SAM, Lookbehind, analysis
from lookbehind_fused.shards import Ranks, shard, shards
from tests.conftest import assert_close, assert_equal
from tests.distributed.table import BASES, TOLERANCE, Collectives, Run, fsdp, full, make_model, mesh_of, tensor_parallel
from tests.twin import values

SGD = {"lr": 0.1, "momentum": 0.8}


class Few:
    """Tensors of all kinds, with gradients that are a formula of the weights, beside plain tensors of one process."""

    def __init__(self, make: Callable[..., Any] = Lookbehind, dtype: torch.dtype = torch.float64, **settings: Any):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        starts = [values(*shape, seed=i).to(dtype) for i, shape in enumerate([(5, 3), (1, 4), (3, 2), (4,)])]
        placements = [[Shard(0)], [Shard(0)], [Replicate()]]
        sharded = [distribute_tensor(x, mesh, at) for x, at in zip(starts, placements, strict=False)]
        self.params = [nn.Parameter(x) for x in (*sharded, starts[3].clone())]
        self.plain = [nn.Parameter(x.clone()) for x in starts]
        settings = {"base_optimizer": torch.optim.SGD, "rho": 0.2, **settings}
        if settings["base_optimizer"] is torch.optim.SGD:
            settings |= SGD
        self.optimizer, self.other = make(self.params, **settings), make(self.plain, **settings)
        self.mesh, self.loss = mesh, torch.zeros(())
        self.meddle: Callable[[list[nn.Parameter], int], None] = lambda params, evaluation: None

    def evaluate(self, params: list[nn.Parameter], optimizer: Any) -> Tensor:
        for number, p in enumerate(params):
            target = values(*p.shape, seed=100 + number).to(p.dtype)
            if isinstance(p, DTensor):
                target = distribute_tensor(target, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = (p.detach() - target) * (1 + 0.1 * number)
        self.meddle(params, optimizer.evaluation.index)
        return self.loss

    def step(self) -> None:
        self.optimizer.step(lambda: self.evaluate(self.params, self.optimizer))

    def both(self) -> None:
        """A step on either side, compared."""
        self.step()
        self.other.step(lambda: self.evaluate(self.plain, self.other))
        for number, (p, q) in enumerate(zip(self.params, self.plain, strict=True)):
            assert_close(f"weights of tensor {number}", full(p), q.detach(), TOLERANCE)

    def refused(self, match: str) -> None:
        """A step raises on each rank, and leaves the weights as they were."""
        before = [x.clone() for x in shards(p.detach() for p in self.params)]
        with pytest.raises(RuntimeError, match=match):
            self.step()
        for number, (p, w) in enumerate(zip(self.params, before, strict=True)):
            assert_equal(f"weights of tensor {number}", shard(p.detach()), w)
        assert self.optimizer.evaluation is None


# ---- ranks that disagree ---------------------------------------------------------------------------------------------


def different(name: str, value: Any, match: str) -> None:
    """From the first step on, and from a later one."""
    for steps in (0, 2):
        few = Few(k=2, alpha=0.4)
        for _ in range(steps):
            few.both()
        if dist.get_rank() == 1:
            setattr(few.optimizer, name, value)
        few.refused(match)
        setattr(few.optimizer, name, getattr(few.other, name))
        few.both()


def different_groups() -> None:
    few = Few()
    if dist.get_rank() == 1:
        few.optimizer = Lookbehind([{"params": [p]} for p in few.params], torch.optim.SGD, rho=0.2, **SGD)
    few.refused("param_groups: expected the same on all 2 ranks")


def different_trained() -> None:
    """A parameter that was never trained on one rank."""
    few = Few(k=2)
    few.params[1].requires_grad_(dist.get_rank() == 0)
    few.meddle = lambda params, evaluation: setattr(params[1], "grad", None)
    few.refused("parameters: expected the same on all 2 ranks")


def different_late() -> None:
    """Where comparing would wait for the device, a rank hears a step late of what another one has changed."""
    event = mock.Mock()
    with mock.patch("lookbehind_fused.agreement._on_its_way", lambda x: (x.clone(), event)):
        few = Few(k=1, alpha=0.4)
        few.both()
        few.both()
        if dist.get_rank() == 1:
            few.optimizer.alpha = 0.5
        else:
            few.step()
        few.refused("settings: expected the same on all 2 ranks")
        assert event.synchronize.called
        few.optimizer.alpha = 0.4
        before = [x.clone() for x in shards(p.detach() for p in few.params)]
        few.step()
    for number, (p, w) in enumerate(zip(few.params, before, strict=True)):
        assert not w.numel() or not torch.equal(shard(p.detach()), w), number


def added(where: tuple[int, ...]) -> None:
    """A parameter of another mesh, on each rank or on one alone."""
    few = Few(k=2)
    few.both()
    x = values(3, 4, seed=50)
    more = nn.Parameter(distribute_tensor(x, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), [Shard(1)]))
    if dist.get_rank() in where:
        few.optimizer.add_param_group({"params": [more]})
        few.params.append(more)
    if len(where) < 2:
        few.refused("par.*: expected the same on all 2 ranks")
        return
    few.plain.append(nn.Parameter(x.clone()))
    few.other.add_param_group({"params": few.plain[-1:]})
    for _ in range(2):
        few.both()


def placed_otherwise() -> None:
    """Between two steps, on both ranks."""
    few = Few(k=2)
    few.both()
    now = nn.Parameter(few.params[0].detach().redistribute(placements=[Replicate()]))
    torch.utils.swap_tensors(few.params[0], now)
    few.refused("parameter 0 .* was replaced between two steps: .*Shard.*Replicate")


# ---- parameters and gradients ----------------------------------------------------------------------------------------


def refused_parameters() -> None:
    mesh = init_device_mesh("cpu", (2,))
    x = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(ValueError, match="parameter 0 .*: expected a DTensor that is sharded or replicated, not Part"):
        SAM([x], torch.optim.SGD, lr=0.1)
    x = nn.Parameter(DTensor.from_local(torch.ones(3), DeviceMesh("cpu", [0]), [Shard(0)]))
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="parameter 0 .*: expected a device mesh that this rank is of, 1, got"):
            SAM([x], torch.optim.SGD, lr=0.1)
    for use_orig_params in (False, True):
        old = FullyShardedDataParallel(nn.Linear(4, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"parameter 0 .*use fully_shard \(FSDP2\)"):
            SAM(old.parameters(), torch.optim.SGD, lr=0.1)


def analysis_is_refused() -> None:
    """It would add up this rank's parts alone."""
    model, *_ = fsdp(make_model())
    with pytest.raises(ValueError, match=r"parameter 0 '0.weight' .*: expected a plain tensor, got a DTensor"):
        analysis.effective_perturbation(model, rho=0.1)


def gradients_that_are_partial() -> None:
    """As if each rank had found a half of them: tensors stay what they would be."""
    few = Few(k=2, max_grad_norm=0.5)

    def halve(params: list[nn.Parameter], evaluation: int) -> None:
        p = params[2]
        if isinstance(p, DTensor):
            p.grad = DTensor.from_local(p.grad.to_local() / 2, p.device_mesh, [Partial()], run_check=False)

    few.meddle = halve
    for _ in range(3):
        few.both()


def low_precision(base: str) -> None:
    """Of 16 bits: the weights of one process to a unit in the last place of bfloat16."""
    base_class, settings = BASES[base]
    few = Few(partial(Lookbehind, **settings), torch.bfloat16, base_optimizer=base_class, k=3, alpha="adaptive")
    for _ in range(3):
        few.step()
        few.other.step(lambda: few.evaluate(few.plain, few.other))
        for number, (p, q) in enumerate(zip(few.params, few.plain, strict=True)):
            assert p.dtype == torch.bfloat16
            assert_close(f"weights of tensor {number}", full(p), q.detach(), 2**-7)


def comes_and_goes() -> None:
    """Gradients that are missing at some evaluations, and a tensor that is trained only within them."""
    few = Few(k=3, alpha="adaptive")

    def misses(params: list[nn.Parameter], evaluation: int) -> None:
        for number in {0: (1,), 1: (0, 3), 2: ()}.get(evaluation, (2,)):
            params[number].grad = None

    few.meddle = misses
    for _ in range(2):
        few.both()
    few = Few(k=2)
    for params in (few.params, few.plain):
        params[0].requires_grad_(False)
    for _ in range(2):
        few.both()


def given_another_dtype() -> None:
    """With the state that it has, as with plain tensors; FSDP2 itself cannot be given one after a forward pass."""
    runs = [
        Run(arrange(make_model()), partial(Lookbehind, k=2, rho=0.2), "Adam", "native")
        for arrange in (lambda model: model, lambda model: tensor_parallel(model)[0])
    ]
    for cast in (nn.Module.double, nn.Module.float, nn.Module.double):
        for run in runs:
            run.optimizer.zero_grad()  # of a DTensor the cast gradient is another tensor than the last step's
            cast(run.model)
            run.dtype = next(run.model.parameters()).dtype
            for _ in range(2):
                run.step()
        for p, q in zip(runs[0].params, runs[1].params, strict=True):
            assert p.dtype == q.dtype == runs[0].dtype
            assert_close("weights", full(q), p.detach(), 1e-5)


def many_buckets() -> None:
    """Groups, scaled and unscaled, of tensors sharded, replicated and plain: one small all-reduce for each norm."""
    few = Few()
    for params in (few.params, few.plain):
        groups = [{"params": [p], "adaptive": i % 2 == 0, "lr": 0.1 / (i + 1)} for i, p in enumerate(params)]
        optimizer = Lookbehind(groups, torch.optim.SGD, k=3, alpha="adaptive", rho=0.2, **SGD)
        few.optimizer, few.other = (optimizer, None) if params is few.params else (few.optimizer, optimizer)
    few.both()
    with Collectives() as collectives:
        few.step()
    assert len(collectives.sizes) == 4
    assert max(collectives.sizes) <= 64


def compiled_form_is_refused() -> None:
    few = Few(k=2)
    before = [x.clone() for x in shards(p.detach() for p in few.params)]
    for evaluation in few.optimizer.evaluations(apply=False):
        few.evaluate(few.params, few.optimizer)
        with pytest.raises(RuntimeError, match=r"apply\(\): expected plain tensors, got a DTensor: parameter 0"):
            few.optimizer.apply(evaluation)
        break
    for p, w in zip(few.params, before, strict=True):
        assert_equal("weights", shard(p.detach()), w)


# ---- steps that do not happen ----------------------------------------------------------------------------------------


def not_finite(number: int, evaluation: int, k: int) -> None:
    """In a part of a tensor that one rank has, or in its replica: both undo the step, and stop as early."""
    few = Few(k=k, nonfinite="skip", alpha="adaptive")
    few.both()
    count = 0

    def spoil(params: list[nn.Parameter], index: int) -> None:
        nonlocal count
        count += 1
        if index == evaluation and dist.get_rank() == 0:
            shard(params[number].grad)[0] = torch.inf

    few.meddle = spoil
    before = [x.clone() for x in shards(p.detach() for p in few.params)]
    few.step()
    for p, w in zip(few.params, before, strict=True):
        assert_equal("weights", shard(p.detach()), w)
    assert few.optimizer.diagnostics["skipped"].item() == 1
    assert count == evaluation + 1
    few.meddle = lambda params, index: None
    few.both()


def overflow(evaluation: int) -> None:
    """A scaler's, on one rank: both undo the step and halve the scale."""
    few = Few(k=2)
    few.both()
    scalers = few.optimizer.scaler, few.other.scaler = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]

    def scale(spoils: bool, params: list[nn.Parameter], index: int) -> None:
        for p in params:
            p.grad = p.grad * 8
        if spoils and index == evaluation and (dist.get_rank() == 1 or not isinstance(params[0], DTensor)):
            shard(params[0].grad)[0] = torch.inf

    for spoils in (False, True):
        few.meddle = partial(scale, spoils)
        few.both()
        for scaler in scalers:
            scaler.update()
    assert [scaler.get_scale() for scaler in scalers] == [4.0, 4.0]


class Failure(Exception):
    pass


def what_fails_is_undone(base: str) -> None:
    """Also the state of a base that runs its own step, and gradients that were there before."""
    base_class, settings = BASES[base]
    few = Few(partial(Lookbehind, **settings), base_optimizer=base_class, k=2)
    few.both()

    def fails(params: list[nn.Parameter], index: int) -> None:
        if index == 2:
            raise Failure

    few.meddle = fails
    before = [x.clone() for x in shards(p.detach() for p in few.params)]
    with pytest.raises(Failure):
        few.step()
    for p, w in zip(few.params, before, strict=True):
        assert_equal("weights", shard(p.detach()), w)
    few.meddle = lambda params, index: None
    for p in few.params:
        p.grad = None
    few.both()


def gradients_that_are_somebodys() -> None:
    """FSDP2 adds to the gradients of accumulation in their shards: they are seen and not lost, on either rank."""
    model, *_ = fsdp(make_model())
    optimizer = Lookbehind(model.parameters(), torch.optim.SGD, k=2, **SGD)
    x = values(4, 3, seed=1)

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    optimizer.step(closure)
    closure()
    with pytest.raises(RuntimeError, match="gradients: expected none, or the last step's"):
        optimizer.step(closure)
    optimizer.zero_grad()
    optimizer.step(closure)
    optimizer.closure = closure
    closure()
    with Collectives() as collectives:
        optimizer.step()
    assert len(collectives.sizes) == 2


def no_gradients() -> None:
    """The step is skipped on both ranks."""
    few = Few(k=2)
    few.both()
    before = [x.clone() for x in shards(p.detach() for p in few.params)]
    with pytest.warns(UserWarning, match="the step was skipped"):
        few.optimizer.step(lambda: few.loss)
    for p, w in zip(few.params, before, strict=True):
        assert_equal("weights", shard(p.detach()), w)


def not_finite_in_a_replica() -> None:
    """Of meshes that cross, on four ranks: wherever it is found, and in whichever tensor, all ranks know of all."""
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    x = torch.ones(4, 2)
    sharded = [distribute_tensor(x, mesh[name], [at]) for name in ("dp", "tp") for at in (Shard(0), Replicate())]
    tensors = [*sharded, x]
    ranks = Ranks(tensors)
    for rank, number, value in itertools.product(range(4), range(5), (None, torch.inf, torch.nan)):
        found = [torch.tensor([1.0, 2.0], dtype=torch.float64) for _ in tensors]
        if value is not None and dist.get_rank() == rank:
            found[number][1] = value
        with Collectives() as collectives:
            ranks.add_up(found)
        assert len(collectives.sizes) == 2
        for parts, sums in zip((2, 1, 2, 1, 1), found, strict=True):
            if value is None:
                assert sums.tolist() == [parts, 2.0 * parts]
            else:
                assert sums.isnan().all(), (rank, number, value)


OF_FOUR: dict[str, Callable[[], None]] = {"crossed-not-finite": not_finite_in_a_replica}
CASES: dict[str, Callable[[], None]] = {
    "differ-k": partial(different, "k", 3, "settings: expected the same on all 2 ranks"),
    "differ-alpha": partial(different, "alpha", 0.7, "settings: expected the same on all 2 ranks"),
    "differ-scope": partial(different, "max_grad_norm", 0.1, "settings: expected the same on all 2 ranks"),
    "differ-groups": different_groups,
    "differ-trained": different_trained,
    "differ-late": different_late,
    "added": partial(added, (0, 1)),
    "added-on-one": partial(added, (1,)),
    "placed-otherwise": placed_otherwise,
    "refused-parameters": refused_parameters,
    "refused-analysis": analysis_is_refused,
    "partial-gradients": gradients_that_are_partial,
    **{f"bfloat16-{base}": partial(low_precision, base) for base in BASES},
    "comes-and-goes": comes_and_goes,
    "another-dtype": given_another_dtype,
    "many-buckets": many_buckets,
    "apply-refused": compiled_form_is_refused,
    **{f"not-finite-{n}-{e}": partial(not_finite, n, e, 3) for n, e in ((0, 1), (2, 0), (3, 2), (0, 3))},
    **{f"overflow-{e}": partial(overflow, e) for e in (0, 2)},
    **{f"fails-{base}": partial(what_fails_is_undone, base) for base in BASES},
    "accumulated": gradients_that_are_somebodys,
    "no-gradients": no_gradients,
}
