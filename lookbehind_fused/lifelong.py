"""Lifelong learning: a memory of tasks that are over, C-MAML's gradients for any optimizer, what is forgotten.

C-MAML (Gupta, Yadav, Paull 2020, arXiv 2007.13904: algorithm 1 with constant learning rates) is a way to get a
gradient, and any optimizer may step with it::

    learner = CMAML(model, F.cross_entropy, Reservoir(200), inner_lr=0.03)

    optimizer = Lookahead(SGD(model.parameters(), lr=0.1), k=5)     # Lookahead-C-MAML
    optimizer = Lookbehind(model.parameters(), SGD, lr=0.1, k=2)    # Lookbehind-C-MAML; with SAM a SAM meta step
    for inputs, targets, task in stream:
        loss = learner.step(optimizer, inputs, targets, task)

These two names are of algorithms 3 and 4 in the appendix of Lookbehind-SAM's paper. They are built here from the
definitions of Lookahead (Zhang et al. 2019, algorithm 1), Lookbehind (algorithm 1 of that paper) and C-MAML: every
gradient that the one asks for is that of the other. The text of the appendix was not at hand, and may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from .arguments import check_bool, check_int, check_number
from .tensors import shown


class Examples(NamedTuple):
    """Some examples, each with the task that it belongs to."""

    inputs: Tensor
    """(N, ...), of any dtype."""
    targets: Tensor
    """(N, ...): whatever the loss takes."""
    tasks: Tensor
    """(N,), int64."""

    def joined(self, others: Examples) -> Examples:
        """These and then ``others``."""
        return Examples(*(torch.cat(pair) for pair in zip(self, others, strict=True)))


def of_task(inputs: Tensor, targets: Tensor, task: int) -> Examples:
    """Examples that are all of one task.

    Raises:
        ValueError: there is not one target for each of at least one input, or ``task`` is no int >= 0.
    """
    check_int("task", task, 0)
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) == 0 or len(inputs) != len(targets):
        raise ValueError(
            "targets: expected one for each of at least one input, got "
            f"{tuple(targets.shape)} for inputs of {tuple(inputs.shape)}"
        )
    return Examples(inputs, targets, torch.full((len(inputs),), task, dtype=torch.int64, device=targets.device))


class Reservoir:
    """An episodic memory: a uniform random sample of all examples that were pushed (Vitter 1985, algorithm R).

    After n examples each of them is in it with the same probability, ``capacity`` / n, whichever task it is of and
    whenever it came; no boundary of a task has to be known.

    Args:
        capacity: how many examples it holds, >= 1.
        seed: of its own random numbers, which no others change; they are part of ``state_dict()``.

    Examples lie where the first ones that were pushed do: on their device, in their dtypes.
    """

    capacity: int
    seen: int
    """How many examples were pushed."""
    generator: torch.Generator
    """Of its random numbers."""

    def __init__(self, capacity: int, *, seed: int = 0) -> None:
        check_int("capacity", capacity, 1)
        check_int("seed", seed, 0)
        self.capacity, self.seen = capacity, 0
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self._held: Examples | None = None  # of ``capacity`` rows, of which the first ``len(self)`` are examples

    def __len__(self) -> int:
        """How many examples it holds: as many as were pushed, at most ``capacity``."""
        return min(self.seen, self.capacity)

    def check(self, examples: Examples) -> None:
        """Refuse examples that could not be held beside those that were pushed before.

        Raises:
            ValueError: their shapes or dtypes are others.
        """
        for name, offered, held in zip(Examples._fields, examples, self._held or examples, strict=True):
            if (offered.shape[1:], offered.dtype) != (held.shape[1:], held.dtype):
                raise ValueError(
                    f"{name}: expected {held.dtype} of shape (N, {', '.join(map(str, held.shape[1:]))}) as the memory "
                    f"has, got {offered.dtype} of {tuple(offered.shape)}"
                )

    def push(self, examples: Examples) -> None:
        """Offers examples to the memory, one after the other. Its copies are without a graph.

        Raises:
            ValueError: their shapes or dtypes are not those of the examples before.
        """
        self.check(examples)
        if self._held is None:
            rows = (x.new_empty((self.capacity, *x.shape[1:]), requires_grad=False) for x in examples)
            self._held = Examples(*rows)
        for row in range(len(examples.tasks)):
            place = self.seen
            if place >= self.capacity:  # algorithm R: one of all that were seen, this one included
                place = int(torch.randint(self.seen + 1, (), generator=self.generator, device="cpu"))
            self.seen += 1
            if place < self.capacity:
                for held, offered in zip(self._held, examples, strict=True):
                    held[place] = offered[row].detach()

    def sample(self, count: int) -> Examples | None:
        """``count`` different examples in random order, or all if there are fewer; None if there is none."""
        check_int("count", count, 0)
        if self._held is None or count == 0:
            return None
        places = torch.randperm(len(self), generator=self.generator, device="cpu")[:count]
        return Examples(*(held[places.to(held.device)] for held in self._held))

    def state_dict(self) -> dict[str, Any]:
        """Everything that it needs to go on as though it had not stopped: ints and tensors, which are copies."""
        held = None if self._held is None else [x[: len(self)].clone() for x in self._held]
        return {
            "capacity": self.capacity, "seen": self.seen, "random": self.generator.get_state(), "examples": held
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what ``state_dict()`` returned.

        Raises:
            ValueError: it is that of a memory of another capacity.
        """
        if state["capacity"] != self.capacity:
            raise ValueError(f"capacity: expected {self.capacity}, got {shown(state['capacity'])}")
        self.generator.set_state(state["random"])
        self.seen, self._held = state["seen"], None
        if state["examples"] is not None:
            rows = [x.new_empty((self.capacity, *x.shape[1:])) for x in state["examples"]]
            self._held = Examples(*rows)
            for held, saved in zip(self._held, state["examples"], strict=True):
                held[: len(self)] = saved


class CMAML:
    """C-MAML (Gupta et al. 2020, algorithm 1 with constant learning rates) over any optimizer.

    Of a minibatch b of task t and examples r of the memory, at the weights w (the perturbed ones, where the optimizer
    asks for them), an evaluation is::

        w_0 = w
        for i in 1..len(b):   w_i = w_(i-1) - inner_lr * grad loss_t(w_(i-1); b_i)      # on single examples
        gradient = the gradient with respect to w of the mean loss over r and b at w_len(b), each with its own head

    and the optimizer steps with it. ``r`` is drawn before b is pushed, once a step, so that the evaluations of a step
    have the same loss.

    Args:
        model: called as ``model(inputs, tasks)`` with tensors of the same length; where there is a head for each task,
            ``tasks`` says which. BatchNorm would see batches of one example.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over examples, 0-dim.
        memory: where examples are drawn from and pushed to.
        inner_lr: learning rate of the inner steps, a number > 0 (alpha in that paper).
        replay: how many examples are drawn from the memory for a step, >= 0.
        second_order: differentiate through the inner steps. Otherwise their gradients count as constants, which costs
            one Hessian-vector product an inner step less.

    Raises:
        TypeError, ValueError: an argument is not acceptable; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        memory: Reservoir,
        *,
        inner_lr: float,
        replay: int = 10,
        second_order: bool = False,
    ) -> None:
        if not isinstance(memory, Reservoir):
            raise TypeError(f"memory: expected a Reservoir, got {shown(memory)}")
        check_number("inner_lr", inner_lr, positive=True)
        check_int("replay", replay, 0)
        check_bool("second_order", second_order)
        self.model, self.loss_fn, self.memory = model, loss_fn, memory
        self.inner_lr, self.replay, self.second_order = inner_lr, replay, second_order

    def step(
        self, optimizer: Optimizer, inputs: Tensor, targets: Tensor, task: int, *, remember: bool = True
    ) -> Tensor:
        """One step of ``optimizer`` on a minibatch of ``task``, which the memory is then offered unless told not to.

        ``remember=False`` is for examples that were offered before: those of the later epochs of a task.

        Returns:
            The loss of the optimizer's step: that of its first evaluation, 0-dim, without a graph.

        Raises:
            ValueError: inputs, targets and task do not fit together or to the memory; nothing has changed then.
        """
        batch = of_task(inputs, targets, task)
        self.memory.check(batch)
        before = self.memory.generator.get_state()
        try:
            replayed = self.memory.sample(self.replay)
            everything = batch if replayed is None else replayed.joined(batch)

            def closure() -> Any:  # torch says float, and means what ``backward`` was called on
                optimizer.zero_grad()
                loss = self.loss_fn(self.adapted(batch, everything), everything.targets)
                loss.backward()
                return loss

            loss: Any = optimizer.step(closure)
        except BaseException:
            self.memory.generator.set_state(before)  # a step that does not happen draws nothing
            raise
        if remember:
            self.memory.push(batch)
        start: Tensor = loss.detach()
        return start

    def adapted(self, batch: Examples, examples: Examples) -> Tensor:
        """The model's outputs for ``examples`` after an inner step on each example of ``batch``, in their order.

        The graph leads to the model's own parameters, which stay as they are.
        """
        weights: dict[str, Tensor] = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for i in range(len(batch.tasks)):
            inputs, targets, tasks = (x[i : i + 1] for x in batch)
            loss = self.loss_fn(functional_call(self.model, weights, (inputs, tasks)), targets)
            gradients = torch.autograd.grad(
                loss, list(weights.values()), create_graph=self.second_order, materialize_grads=True
            )  # fmt: skip
            moved = (w - self.inner_lr * g for w, g in zip(weights.values(), gradients, strict=True))
            weights = dict(zip(weights, moved, strict=True))
        outputs: Tensor = functional_call(self.model, weights, (examples.inputs, examples.tasks))
        return outputs


def average_accuracy(table: Sequence[Sequence[float]]) -> float:
    """The mean over all T tasks of the accuracy after the last one: 1/T sum_j a_(T,j) (Lopez-Paz and Ranzato 2017).

    Args:
        table: T rows, one after each task: a_(i,j) is the accuracy on task j after training on task i. Row i has at
            least i entries, the further ones are not read.

    Raises:
        ValueError: ``table`` has no rows, or a row is too short.
    """
    check_table(table)
    return math.fsum(table[-1][: len(table)]) / len(table)


def forgetting(table: Sequence[Sequence[float]]) -> float:
    """What was lost of the best accuracy on each task but the last: 1/(T-1) sum_(j<T) max_(i<T) (a_(i,j) - a_(T,j))
    (Chaudhry et al. 2018, equations 3 and 4), the maximum being over the rows from j on, where j has been trained on.

    Negative where later tasks improved the earlier ones; 0 for a single task. ``table``: that of ``average_accuracy``.

    Raises:
        ValueError: ``table`` has no rows, or a row is too short.
    """
    check_table(table)
    last = len(table) - 1
    lost = [max(table[i][j] for i in range(j, last)) - table[last][j] for j in range(last)]
    return math.fsum(lost) / last if last else 0.0


def check_table(table: Sequence[Sequence[float]]) -> None:
    """Refuse a table of accuracies without rows, or whose row i has no entry for each of the first i tasks.

    Raises:
        ValueError: naming the row.
    """
    if not len(table):
        raise ValueError("table: expected a row for each task, got none")
    for i, row in enumerate(table):
        if len(row) <= i:
            raise ValueError(f"table[{i}]: expected at least {i + 1} entries, one a task so far, got {len(row)}")
