"""What sharpness-aware training is for, measured: sharpness, robustness to noise in the weights, how the gradients of
Lookbehind's ascent agree, and what a forward pass in 16 bits sees of an ascent.

Every function but ``effective_perturbation`` takes a model and an iterable of batches ``(inputs, targets)`` that may be
gone through again, such as a ``DataLoader``; inputs and targets are tensors whose first dimension counts examples, and
are moved to the device of the model's first parameter. The model is measured in eval mode: BatchNorm uses its running
statistics, dropout is off. Whatever happens, an exception or an interrupt included, the model is left as it was, bit
for bit: weights, buffers, gradients, ``requires_grad``, the mode of each submodule; so is torch's global random state.
That takes a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .arguments import GROUP_DEFAULTS, check_bool, check_group, check_int, check_number, check_numbers
from .kernels import Flag, reference
from .kernels.schema import tensor_table
from .rounding import EffectivePerturbation, effective_perturbation
from .tensors import describe, layout, parameters_of, weights_written

__all__ = [
    "EffectivePerturbation",
    "effective_perturbation",
    "estimate_statistics",
    "gradient_alignment",
    "noise_robustness",
    "sharpness",
]

Batches = Iterable[Any]
LossFunction = Callable[[Tensor, Tensor], Tensor]


def sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Batches,
    radii: Sequence[float],
    *,
    adaptive: bool = False,
    eta: float = GROUP_DEFAULTS["eta"],
    m: int | None = None,
    progress: bool = False,
) -> Tensor:
    """m-sharpness: by how much one ascent raises the loss, ``L(w + eps) - L(w)``, averaged over microbatches.

    ``eps = radius * T^2 g / (||T g||_2 + 1e-16)``, g being the gradient of the microbatch's loss at w, and the norm
    running over all parameters together. T = 1 is SAM's ball (Foret et al. 2021, equation 2; Mordido et al. 2024,
    equations 5 and 6), T = |w| + eta ASAM's (Kwon et al. 2021; equation 8 there). A microbatch takes one gradient, and
    one forward pass for each radius. Parameters that get no gradient are not perturbed.

    Args:
        model: maps inputs to the outputs that ``loss_fn`` takes.
        loss_fn: ``loss_fn(outputs, targets)`` is the mean loss over the examples, a tensor of one element.
        loader: batches; the mean weighs each microbatch with its number of examples.
        radii: finite numbers > 0, in units of the weights (adaptive: of the scaled weights).
        adaptive: ASAM's ball.
        eta: ASAM's stabilizer, >= 0.
        m: examples in a microbatch, >= 1, a divisor of every batch's; None takes each batch whole.
        progress: show a bar over the batches (tqdm).

    Returns:
        float64 of shape ``(len(radii),)`` on the CPU, in units of the loss.

    Raises:
        TypeError, ValueError: an argument, a batch or a parameter is not acceptable, ``loader`` gives no batch, or a
            batch cannot be split into microbatches of m.
        ImportError: ``progress`` without tqdm.
    """
    check_numbers("radii", radii, positive=True)
    if m is not None:
        check_int("m", m, 1)
    check_group({"rho": 0, "eta": eta, "adaptive": adaptive})
    params = _trainable(model)
    bar = _bar(progress, "sharpness")
    with _left_as_it_was(model) as kept:
        rises, examples = torch.zeros(len(radii), dtype=torch.float64, device="cpu"), 0
        for inputs, targets in bar(_pairs(model, loader), loader):
            size = len(inputs) if m is None else m
            if len(inputs) % size:
                raise ValueError(f"m: expected a divisor of every batch's size, got {m} for a batch of {len(inputs)}")
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                loss, grads = _loss_and_gradients(model, loss_fn, params, x, y)
                for i, radius in enumerate(radii):
                    _ascend(params, grads, _vectors(kept[p] for p in params), radius, adaptive, eta)
                    with torch.no_grad():
                        rises[i] += size * (_loss(model, loss_fn, x, y).double() - loss).item()
                _put_back(kept, params)
            examples += len(inputs)
    return rises / examples


def noise_robustness(
    model: nn.Module,
    loader: Batches,
    levels: Sequence[float],
    *,
    samples: int = 10,
    statistics_loader: Batches | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Accuracy under multiplicative Gaussian noise in the weights: ``w * (1 + level * xi)``, xi ~ N(0, 1) for every
    element of every parameter (Mordido et al. 2024, section 4.4).

    A sample draws its xi once and scales it by each level, so that the levels are compared on the same noise: parameter
    by parameter, in the order of ``model.parameters()``, from a ``torch.Generator`` of its own on the CPU, in float64
    for float64 parameters and float32 for others. Level 0 leaves the weights as they are: plain accuracy, with
    statistics estimated anew like at any other level if there is a ``statistics_loader``.

    Args:
        model: maps inputs to outputs of shape ``(N, classes, ...)``; the largest along dimension 1 is its answer.
        loader: batches; targets of shape ``(N, ...)`` hold the right classes.
        levels: finite numbers >= 0, without unit.
        samples: how often noise is drawn, >= 1.
        statistics_loader: batches, or inputs alone, from which BatchNorm's running statistics are estimated anew for
            each level and sample: the cumulative average, over one pass, of the statistics of each batch under the
            weights with noise, BatchNorm alone being in train mode. None keeps the statistics that the model has.
        seed: of the noise, an int >= 0.
        progress: show a bar over levels and samples (tqdm).

    Returns:
        float64 of shape ``(len(levels), samples)`` on the CPU: fractions of right answers.

    Raises:
        TypeError, ValueError: an argument, a batch, the outputs or a parameter are not acceptable, or a loader gives no
            batch.
        ImportError: ``progress`` without tqdm.
    """
    check_numbers("levels", levels)
    check_int("samples", samples, 1)
    check_int("seed", seed, 0)
    params = [p for p in parameters_of(model) if p.is_floating_point()]
    bar = _bar(progress, "noise robustness")
    generator = torch.Generator().manual_seed(seed)
    with _left_as_it_was(model) as kept, torch.no_grad():
        accuracy = torch.zeros(len(levels), samples, dtype=torch.float64, device="cpu")
        runs = [(sample, i) for sample in range(samples) for i in range(len(levels))]
        for sample, i in bar(runs, runs):
            if i == 0:
                noise = [_normal(p, generator) for p in params]
            for p, xi in zip(params, noise, strict=True):
                p.copy_(kept[p].to(xi.dtype) * (1 + levels[i] * xi))
            weights_written()
            if statistics_loader is not None:
                estimate_statistics(model, statistics_loader)
            accuracy[i, sample] = _accuracy(model, loader)
    return accuracy


def gradient_alignment(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Batches,
    *,
    rho: float,
    k: int,
    adaptive: bool = False,
    eta: float = GROUP_DEFAULTS["eta"],
    progress: bool = False,
) -> Tensor:
    """Cosines between the gradients at the k + 1 points of Lookbehind's ascent, each ascent beginning where the last
    one led (Mordido et al. 2024, algorithm 1): ``[i, j]`` belongs to evaluations i and j of a step.

    Takes k + 1 gradients a batch and holds them all. The cosine with a gradient of 0 is 0; a parameter that an
    evaluation does not reach counts with 0 there.

    Args:
        model, loss_fn, loader, adaptive, eta, progress: as for ``sharpness``; every batch counts the same.
        rho: radius of one ascent, a finite number > 0.
        k: ascents, >= 1.

    Returns:
        float64 of shape ``(k + 1, k + 1)`` on the CPU, the mean over the batches.

    Raises:
        TypeError, ValueError: an argument, a batch or a parameter is not acceptable, or ``loader`` gives no batch.
        ImportError: ``progress`` without tqdm.
    """
    check_number("rho", rho, positive=True)
    check_int("k", k, 1)
    check_group({"rho": rho, "eta": eta, "adaptive": adaptive})
    params = _trainable(model)
    bar = _bar(progress, "gradient alignment")
    with _left_as_it_was(model) as kept:
        total, batches = torch.zeros(k + 1, k + 1, dtype=torch.float64, device="cpu"), 0
        for inputs, targets in bar(_pairs(model, loader), loader):
            perturbed = _vectors(kept[p] for p in params)
            _, grads = _loss_and_gradients(model, loss_fn, params, inputs, targets)
            found = [grads]
            for _ in range(k):
                _ascend(params, grads, perturbed, rho, adaptive, eta)
                _, grads = _loss_and_gradients(model, loss_fn, params, inputs, targets)
                found.append(grads)
            total += _cosines(params, found)
            batches += 1
            _put_back(kept, params)
    return total / batches


# ---- the model, moved and put back -----------------------------------------------------------------------------------


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """The model in eval mode, free to be changed; puts everything back in the end. Gives the copy of each tensor."""
    modes = [(module, module.training) for module in model.modules()]
    named_by_modules: list[dict[str, Any]] = [x for m, _ in modes for x in (m._parameters, m._buffers)]
    places = [(named, dict(named)) for named in named_by_modules]
    tensors = dict.fromkeys(x for _, named in places for x in named.values() if x is not None)
    kept = {x: x.detach().clone() for x in tensors}
    flags = [(x, x.requires_grad) for x in tensors]
    grads = [(x, x.grad, None if x.grad is None else x.grad.detach().clone()) for x in tensors if x.is_leaf]
    on_cuda = sorted({x.device.index for x in tensors if x.is_cuda})
    with torch.random.fork_rng(on_cuda):
        try:
            model.eval()
            yield kept
        finally:
            for module, training in modes:
                module.training = training
            for named, before in places:
                named.clear()
                named.update(before)
            _put_back(kept, kept)
            for x, requires_grad in flags:
                if x.requires_grad != requires_grad:
                    x.requires_grad_(requires_grad)
            for x, grad, copy in grads:
                x.grad = grad
                if grad is not None and copy is not None:
                    grad.detach().copy_(copy)


def _put_back(kept: dict[Tensor, Tensor], tensors: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for x in tensors:
            if not _expanded(x):  # nothing can have written there
                x.copy_(kept[x])
    weights_written()


def _expanded(x: Tensor) -> bool:
    return x.layout == torch.strided and any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))


def _trainable(model: nn.Module) -> list[Tensor]:
    params = [p for p in parameters_of(model) if p.requires_grad]
    if not params:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    return params


# ---- gradients and ascents -------------------------------------------------------------------------------------------


def _loss(model: nn.Module, loss_fn: LossFunction, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = loss_fn(model(inputs), targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = describe(*layout(loss)[:3]) if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"loss_fn: expected a tensor of one element, got {got}")
    return loss.sum()


def _loss_and_gradients(
    model: nn.Module, loss_fn: LossFunction, params: Sequence[Tensor], inputs: Tensor, targets: Tensor
) -> tuple[Tensor, reference.Gradients]:
    """The loss, float64, and its gradient in each parameter; None where it does not depend on one."""
    with torch.enable_grad():
        loss = _loss(model, loss_fn, inputs, targets)
        if not loss.requires_grad:
            raise ValueError("loss_fn: expected a loss that depends on a parameter which requires a gradient, got none")
        grads = torch.autograd.grad(loss, params, allow_unused=True)
    return loss.detach().double(), [None if g is None else g.to_dense() for g in grads]


def _vectors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies in memory order and in the dtype that an ascent is computed in."""
    return [reference.vector(x).to(_arithmetic(x), copy=True) for x in tensors]


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _ascend(
    params: Sequence[Tensor],
    grads: reference.Gradients,
    perturbed: Sequence[Tensor],
    rho: float,
    adaptive: bool,
    eta: float,
) -> None:
    """One ascent from ``perturbed``, written there and into the parameters: the reference's passes, each tensor being a
    bucket of its own, so that dtypes and devices may be mixed. Tensors without a gradient are left alone.
    """
    reached = [(p, g, w) for p, g, w in zip(params, grads, perturbed, strict=True) if g is not None]
    tables = [tensor_table([p], [0], [0]) for p, _, _ in reached]
    hyper = torch.tensor([[rho, eta]], dtype=torch.float64, device="cpu")
    sq_norms = torch.zeros(len(reached), 2, dtype=torch.float64, device="cpu")
    flags = Flag.ADAPTIVE * adaptive
    for row, ((p, g, w), table) in enumerate(zip(reached, tables, strict=True)):
        of_one = torch.zeros(1, 2, dtype=torch.float64, device=p.device)
        reference.reduce_sq_norm([p], [g], w, table, hyper, flags, of_one, 0)
        sq_norms[row] = of_one[0]
    for (p, g, w), table in zip(reached, tables, strict=True):
        reference.ascend([p], [g], w, None, table, sq_norms.to(p.device), -1, hyper, flags)
    weights_written()


def _cosines(params: Sequence[Tensor], gradients: Sequence[reference.Gradients]) -> Tensor:
    """Between n gradients, each a tensor for every parameter: float64 of shape (n, n)."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device="cpu")
    for p, *of_tensor in zip(params, *gradients, strict=True):
        if p.numel():
            x = torch.stack([(torch.zeros_like(p) if g is None else g).double().flatten() for g in of_tensor])
            products += (x @ x.T).cpu()
    lengths = products.diagonal().sqrt()
    lengths = lengths[:, None] * lengths
    return torch.where(lengths == 0, 0.0, products / lengths).clamp(-1.0, 1.0)


# ---- noise, statistics, accuracy -------------------------------------------------------------------------------------


def _normal(p: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU: the same on every device."""
    return torch.randn(p.shape, generator=generator, dtype=_arithmetic(p), device="cpu").to(p.device)


def estimate_statistics(model: nn.Module, loader: Batches) -> None:
    """Estimate BatchNorm's running statistics anew: the mean over the batches of what each of them gives.

    Only BatchNorm's own modes are changed, and put back; it does not restore the statistics that there were.

    Args:
        model: maps inputs to outputs; every ``_BatchNorm`` with running statistics takes part.
        loader: batches ``(inputs, targets)``, or inputs alone.

    Raises:
        TypeError, ValueError: a batch is not acceptable, or ``loader`` gives none.
    """
    norms = [x for x in model.modules() if isinstance(x, _BatchNorm) and x.running_mean is not None]
    before = [(norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative average
            norm.training = True
        with torch.no_grad():
            for batch in _batches("statistics_loader", loader):
                inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not isinstance(inputs, Tensor):
                    raise TypeError(f"statistics_loader: expected tensors, or pairs of them, got {_kind(batch)}")
                model(inputs.to(_device(model)))
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, training


def _accuracy(model: nn.Module, loader: Batches) -> float:
    right = count = 0
    for inputs, targets in _pairs(model, loader):
        outputs = model(inputs)
        shape = outputs.shape if isinstance(outputs, Tensor) else ()
        if len(shape) < 2 or (shape[0], *shape[2:]) != tuple(targets.shape):
            raise ValueError(
                "model: expected outputs of shape (N, classes, ...) for targets of shape (N, ...), got "
                f"{tuple(shape) or _kind(outputs)} for {tuple(targets.shape)}"
            )
        right += (outputs.argmax(1) == targets).sum().item()
        count += targets.numel()
    return right / count


# ---- batches ---------------------------------------------------------------------------------------------------------


def _batches(name: str, loader: Batches) -> Iterator[Any]:
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name}: expected an iterable of batches, got {_kind(loader)}")
    number = -1
    for number, batch in enumerate(loader):  # noqa: B007
        yield batch
    if number < 0:
        raise ValueError(f"{name}: expected at least one batch each time it is gone through, got none")


def _pairs(model: nn.Module, loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets on the model's device."""
    device = _device(model)
    for batch in _batches("loader", loader):
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)
        if not pair:
            raise TypeError(f"loader: expected pairs of tensors (inputs, targets), got {_kind(batch)}")
        inputs, targets = batch
        if not inputs.dim() or not targets.dim() or not 0 < len(inputs) == len(targets):
            raise ValueError(
                "loader: expected inputs and targets of the same number of examples, at least one, got shapes "
                f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
            )
        yield inputs.to(device), targets.to(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(x).__name__ for x in value) or 'nothing'}"
    return type(value).__name__


def _bar(progress: bool, what: str) -> Callable[[Iterable[Any], Any], Iterable[Any]]:
    """A function that goes through its first argument, with a bar as long as its second if asked for."""
    check_bool("progress", progress)
    if not progress:
        return lambda items, _: items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: expected tqdm to be there: pip install lookbehind_fused[train]") from error

    def length(sized: Any) -> int | None:
        try:
            return len(sized)
        except TypeError:  # not every loader knows
            return None

    return lambda items, sized: tqdm(items, desc=what, total=length(sized), leave=False)
