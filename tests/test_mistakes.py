"""What a new user is likeliest to get wrong: the input, and the whole message, which says what was expected, what came,
and what to do. That nothing has changed by it is seen in ``test_arguments.py``.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import ASAM, SAM, LambdaSchedule, Lookahead, Lookbehind, MultistepSAM, compat

SGD = torch.optim.SGD
SCREEN = 8 * 100  # characters: whatever the size of the model
PARAMETER = "parameter 0 (shape (3, 3), float32)"
NO_GRADIENTS = (
    "evaluation 0 has left no gradients on the optimizer's parameters: the step was skipped; call loss.backward() at "
    "each evaluation, with a loss of the model whose parameters these are"
)


class User:
    """A model with many layers, and what a user writes around it."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(60)))
        self.params = list(self.model.parameters())

    def loss(self) -> Tensor:
        return self.model(torch.ones(2, 3)).square().mean()

    def closure(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss

    def optimizer(self, **settings: object) -> Lookbehind:
        return Lookbehind(self.model.parameters(), SGD, **{"lr": 0.1, **settings})


Mistake = Callable[[User], object]


def forgets_backward_later(user: User) -> None:
    for evaluation in user.optimizer().evaluations():
        user.closure() if evaluation.index == 0 else user.loss()


def forgets_backward_in_the_loop(user: User) -> None:
    for _ in user.optimizer().evaluations():
        user.loss()


def converts_the_model_inside(user: User) -> None:
    for evaluation in user.optimizer().evaluations():
        if evaluation.index == 1:
            user.model.double()
            user.model(torch.ones(2, 3).double()).mean().backward()
        else:
            user.closure()


def saves_inside(user: User) -> None:
    optimizer = user.optimizer()
    for _ in optimizer.evaluations():
        user.closure()
        optimizer.state_dict()


def has_sparse_gradients(user: User) -> None:
    model = nn.Embedding(5, 3, sparse=True)

    def closure() -> None:
        model(torch.tensor([1, 2])).sum().backward()

    Lookbehind(model.parameters(), SGD, lr=0.1).step(closure)


def uses_a_scaler_that_is_not_given(user: User) -> None:
    optimizer, scaler = user.optimizer(), torch.amp.GradScaler("cpu")
    scaler.scale(user.loss()).backward()
    scaler.step(optimizer)


def calls_backward_before(user: User) -> None:
    optimizer = user.optimizer()
    user.closure()
    optimizer.step(user.closure)


def descends_first(user: User) -> None:
    optimizer = user.optimizer()
    user.closure()
    optimizer.descent_step()


def steps_one_optimizer_inside_another(user: User) -> None:
    first, second = user.optimizer(), user.optimizer()
    for _ in first.evaluations():
        second.step(user.closure)


def steps_the_base_inside(user: User) -> None:
    base = SGD(user.params, lr=0.1)
    for _ in Lookbehind(None, base).evaluations():
        user.closure()
        base.step()


def uses_parameters_twice(user: User) -> None:
    params = user.model.parameters()
    for _ in range(2):
        Lookbehind(params, SGD, lr=0.1)


MISTAKES: dict[str, tuple[Mistake, type[Exception], str]] = {
    # ---- the base optimizer
    "base as a string": (
        lambda user: Lookbehind(user.params, "SGD", lr=0.1),
        TypeError,
        "base_optimizer: expected a torch optimizer class or instance, such as torch.optim.SGD, got 'SGD'",
    ),
    "a misspelt string": (
        lambda user: Lookbehind(user.params, "adamw", lr=0.1),
        TypeError,
        "base_optimizer: expected a torch optimizer class or instance, such as torch.optim.AdamW, got 'adamw'",
    ),
    "model as base": (
        lambda user: Lookbehind(user.params, user.model, lr=0.1),
        TypeError,
        "base_optimizer: expected a torch optimizer class or instance, such as torch.optim.SGD, got an instance of "
        "Sequential",
    ),
    "no base": (
        lambda user: Lookbehind(user.params, lr=0.1),
        TypeError,
        "Lookbehind.__init__() missing 1 required positional argument: 'base_optimizer'",
    ),
    "LBFGS": (
        lambda user: Lookbehind(user.params, torch.optim.LBFGS),
        ValueError,
        "base_optimizer: expected one whose step() needs no closure, such as torch.optim.SGD, got LBFGS",
    ),
    "Lookbehind in Lookbehind": (
        lambda user: Lookbehind(None, user.optimizer()),
        ValueError,
        "base_optimizer: expected one whose step() needs no closure, such as torch.optim.SGD, got Lookbehind",
    ),
    "lr beside an instance": (
        lambda user: Lookbehind(None, SGD(user.params, lr=0.1), lr=0.2),
        TypeError,
        "lr: expected only with a class as base_optimizer, got 0.2 with an instance of SGD; give it to SGD itself",
    ),
    # ---- parameters
    "model for params": (
        lambda user: Lookbehind(user.model, SGD, lr=0.1),
        TypeError,
        "params: expected parameters, such as model.parameters(), got an instance of Sequential",
    ),
    "parameters not called": (
        lambda user: Lookbehind(user.model.parameters, SGD, lr=0.1),
        TypeError,
        "params: expected parameters, such as model.parameters(), got the method parameters; call it",
    ),
    "a single tensor": (
        lambda user: Lookbehind(user.params[0], SGD, lr=0.1),
        TypeError,
        "params: expected parameters, such as model.parameters(), got a tensor of shape (3, 3), float32, cpu; put it "
        "into a list",
    ),
    "an iterator twice": (
        uses_parameters_twice,
        ValueError,
        "params: expected at least one parameter, got an iterator without any; model.parameters() can be gone through "
        "once, so call it for each optimizer",
    ),
    "params given twice": (
        lambda user: Lookbehind([*user.params, user.params[0]], SGD, lr=0.1),
        ValueError,
        f"parameter 120 (shape (3, 3), float32) is the same tensor as {PARAMETER}: expected every parameter to have "
        "memory of its own; give each once",
    ),
    "a complex parameter": (
        lambda user: Lookbehind([nn.Parameter(torch.ones(2, dtype=torch.complex64))], SGD, lr=0.1),
        ValueError,
        "parameter 0 (shape (2,), complex64): expected a real tensor (torch.view_as_real makes one), got shape (2,), "
        "complex64, cpu, strides (1,)",
    ),
    "a frozen model": (
        lambda user: (user.model.requires_grad_(False), user.optimizer().step(user.loss)),
        RuntimeError,
        "params: expected at least one that requires a gradient, got 120 of which none does; requires_grad_() on those "
        "that are to be trained",
    ),
    # ---- settings
    "negative rho": (
        lambda user: user.optimizer(rho=-0.05),
        ValueError,
        "rho: expected a finite number >= 0, got -0.05",
    ),
    "k = 0": (lambda user: user.optimizer(k=0), ValueError, "k: expected an int >= 1, got 0"),
    "alpha = 2": (
        lambda user: user.optimizer(alpha=2),
        ValueError,
        'alpha: expected a number in (0, 1] or "adaptive", got 2',
    ),
    "rho by position": (
        lambda user: Lookbehind(user.params, SGD, 0.05),
        TypeError,
        "Lookbehind.__init__() takes 3 positional arguments but 4 were given",
    ),
    "unknown backend": (
        lambda user: user.optimizer(backend="gpu"),
        ValueError,
        "backend: expected one of 'auto', 'reference', 'native', 'triton', 'cuda', got 'gpu'",
    ),
    "backend of another device": (
        lambda user: user.optimizer(backend="triton").step(user.closure),
        ValueError,
        "backend: expected one with kernels for tensors on cpu, got 'triton', which is for GPUs; 'auto' takes the "
        "fastest that there is for each device",
    ),
    "k for SAM": (
        lambda user: SAM(user.params, SGD, lr=0.1, k=3),
        TypeError,
        "k: expected no such argument for SAM, got 3; Lookbehind has it",
    ),
    # ---- a misspelt argument
    "misspelt": (
        lambda user: user.optimizer(roh=0.1),
        TypeError,
        "roh: neither Lookbehind nor SGD takes such an argument, got 0.1; did you mean 'rho'?",
    ),
    "misspelt, of the base": (
        lambda user: user.optimizer(momentun=0.9),
        TypeError,
        "momentun: neither Lookbehind nor SGD takes such an argument, got 0.9; did you mean 'momentum'?",
    ),
    "no such argument": (
        lambda user: user.optimizer(warmup=10),
        TypeError,
        "warmup: neither Lookbehind nor SGD takes such an argument, got 10",
    ),
    "misspelt, with an instance": (
        lambda user: Lookbehind(None, SGD(user.params, lr=0.1), alhpa=0.3),
        TypeError,
        "alhpa: neither Lookbehind nor SGD takes such an argument, got 0.3; did you mean 'alpha'?",
    ),
    "misspelt, SAM": (
        lambda user: SAM(user.params, SGD, lr=0.1, adaptiv=True),
        TypeError,
        "adaptiv: neither SAM nor SGD takes such an argument, got True; did you mean 'adaptive'?",
    ),
    "misspelt, ASAM": (
        lambda user: ASAM(user.params, torch.optim.AdamW, ettta=0.1),
        TypeError,
        "ettta: neither ASAM nor AdamW takes such an argument, got 0.1; did you mean 'eta'?",
    ),
    "misspelt, MultistepSAM": (
        lambda user: MultistepSAM(user.params, SGD, lr=0.1, averge=True),
        TypeError,
        "averge: neither MultistepSAM nor SGD takes such an argument, got True; did you mean 'average'?",
    ),
    "misspelt, Lookahead": (
        lambda user: Lookahead(SGD, params=user.params, lr=0.1, alhpa=0.3),
        TypeError,
        "alhpa: neither Lookahead nor SGD takes such an argument, got 0.3; did you mean 'alpha'?",
    ),
    "misspelt, Lookahead over SAM": (
        lambda user: Lookahead(SAM, params=user.params, base_optimizer=SGD, lr=0.1, roh=0.3),
        TypeError,
        "roh: neither Lookahead nor SAM nor SGD takes such an argument, got 0.3; did you mean 'rho'?",
    ),
    "misspelt, Lookahead around an instance": (
        lambda user: Lookahead(SGD(user.params, lr=0.1), alhpa=0.3),
        TypeError,
        "alhpa: neither Lookahead nor SGD takes such an argument, got 0.3; did you mean 'alpha'?",
    ),
    "misspelt, the authors' form": (
        lambda user: compat.LookbehindSAM(SGD(user.params, lr=0.1), user.model, k_step=3),
        TypeError,
        "k_step: neither LookbehindSAM nor SGD takes such an argument, got 3; did you mean 'k_steps'?",
    ),
    "misspelt, a setting of the authors' form": (
        lambda user: compat.SAM(SGD(user.params, lr=0.1), user.model, nonfinit="skip"),
        TypeError,
        "nonfinit: neither SAM nor SGD takes such an argument, got 'skip'; did you mean 'nonfinite'?",
    ),
    "misspelt, the single-file form": (
        lambda user: compat.SingleFileSAM(user.params, SGD, lr=0.1, use_cg=True),
        TypeError,
        "use_cg: neither SingleFileSAM nor SGD takes such an argument, got True; did you mean 'use_gc'?",
    ),
    # ---- a step
    "no closure": (
        lambda user: user.optimizer().step(),
        TypeError,
        "closure: expected a function that runs forward and backward and returns the loss, since a step takes several "
        "gradients; got None (loops that call backward themselves: evaluations(), or once for all optimizer.closure = "
        "a function that does it again)",
    ),
    "the loss as closure": (
        lambda user: user.optimizer().step(user.loss()),
        TypeError,
        "closure: expected a function that runs forward and backward and returns the loss, since a step takes several "
        "gradients; got a tensor of shape (), float32, cpu (loops that call backward themselves: evaluations(), or "
        "once for all optimizer.closure = a function that does it again)",
    ),
    "closure without backward": (lambda user: user.optimizer().step(user.loss), UserWarning, NO_GRADIENTS),
    "loop without backward": (forgets_backward_in_the_loop, UserWarning, NO_GRADIENTS),
    "no backward later": (
        forgets_backward_later,
        RuntimeError,
        "evaluation 1: expected a backward that gives parameters their gradients, but none has one; call "
        "loss.backward() at each evaluation, with a loss of the model whose parameters these are",
    ),
    "backward before the step": (
        calls_backward_before,
        RuntimeError,
        "gradients: expected none, or the last step's, when a step begins, since each evaluation starts from cleared "
        f"ones, but {PARAMETER} and 119 more have others, which are not cleared before evaluation 0 adds to them. If "
        "they are not wanted, call zero_grad() before the step or in the closure; if they are accumulated, let the "
        "closure run backward for all microbatches of the step, or use them as evaluation 0: optimizer.closure = the "
        "function that gives the other gradients, and step() without one",
    ),
    "descent first": (
        descends_first,
        RuntimeError,
        "descent_step(): expected after ascent_step(), but no step is open",
    ),
    "model moved inside": (
        converts_the_model_inside,
        RuntimeError,
        f"{PARAMETER} was moved inside an open step: expected shape (3, 3), float32, cpu in its place, got shape (3, "
        "3), float64, cpu at another address; move the model between two steps",
    ),
    "state_dict inside": (
        saves_inside,
        RuntimeError,
        "state_dict(): expected no open step, but the weights are those of an evaluation; complete the step, or "
        "restore them with abort_step()",
    ),
    "two optimizers on one model": (
        steps_one_optimizer_inside_another,
        RuntimeError,
        f"{PARAMETER}: expected no open step of another optimizer over it; complete that one, or restore the weights "
        "with its abort_step()",
    ),
    "the base stepped inside": (
        steps_the_base_inside,
        RuntimeError,
        "SGD.step(): expected no open step, since Lookbehind moves the weights with each gradient itself; leave the "
        "call out",
    ),
    "sparse gradients": (
        has_sparse_gradients,
        RuntimeError,
        "the gradient of parameter 0 (shape (5, 3), float32): expected a dense tensor of torch.float32, got "
        "torch.sparse_coo of torch.float32; build the layer with sparse=False",
    ),
    "a scaler that is not given": (
        uses_a_scaler_that_is_not_given,
        RuntimeError,
        "scaler: expected the GradScaler whose step() calls this optimizer, got None; a step evaluates gradients of "
        "its own, which it has to unscale: Lookbehind(..., scaler=scaler) or optimizer.scaler = scaler",
    ),
    # ---- around it
    "a schedule of rho over the base": (
        lambda user: LambdaSchedule(SGD(user.params, lr=0.1), rho=lambda step: 1.0),
        TypeError,
        "optimizer: expected Lookbehind or a method of the family, got an instance of SGD; give it the one that is "
        "built around that",
    ),
    "a path for a state dict": (
        lambda user: user.optimizer().load_state_dict("checkpoint.pt"),
        ValueError,
        "state_dict: expected a dict as state_dict() returns, got 'checkpoint.pt'; torch.load gives what a file has",
    ),
}


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")  # torch's own, of what we refuse
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    make, kind, message = MISTAKES[name]
    assert len(message) <= SCREEN
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="evaluation 0")
        with pytest.raises(kind) as caught:
            make(User())
    assert str(caught.value) == message


@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
def test_what_torch_allows_is_none(base: type[torch.optim.Optimizer]) -> None:
    """No lr, which is then torch's; a closure that returns nothing; two optimizers over one model that take turns."""
    user = User()
    first, second = (Lookbehind(user.model.parameters(), base) for _ in range(2))
    assert first.param_groups[0]["lr"] == base(user.params).defaults["lr"]
    before = user.params[-1].detach().clone()
    assert first.step(lambda: user.loss().backward()) is None
    assert not torch.equal(user.params[-1], before)
    second.zero_grad()
    second.step(user.closure)


def test_a_base_that_takes_anything_says_itself_what_it_refuses() -> None:
    class Own(SGD):
        def __init__(self, params, **settings):
            if "rate" not in settings:
                raise TypeError(f"expected a rate, got {settings}")
            super().__init__(params, lr=settings["rate"])

    user = User()
    with pytest.raises(TypeError, match="^expected a rate, got {'lr': 0.1}"):
        Lookbehind(user.params, Own, lr=0.1)
    assert Lookbehind(user.params, Own, rate=0.25).param_groups[0]["lr"] == 0.25


def steps_base_in_a_loop(optimizer: Lookbehind, user: User) -> None:
    for _ in optimizer.evaluations():
        user.closure()
        optimizer.base_optimizer.step()


def steps_base_in_a_pair(optimizer: Lookbehind, user: User) -> None:
    user.closure()
    optimizer.ascent_step()
    optimizer.base_optimizer.step()


@pytest.mark.parametrize("mistake", [steps_base_in_a_loop, steps_base_in_a_pair])
@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop])
def test_the_base_may_be_stepped_between_steps_alone(
    base: type[torch.optim.Optimizer], mistake: Callable[[Lookbehind, User], None]
) -> None:
    """One with a rule, and one whose own ``step()`` runs within ours; in an empty first group there is no tensor."""
    user = User()
    own = base([{"params": []}, {"params": user.params}], lr=0.01)
    optimizer = Lookbehind(None, own, k=1)
    before = [p.detach().clone() for p in user.params]
    with pytest.raises(RuntimeError, match=rf"^{base.__name__}\.step\(\): expected no open step"):
        mistake(optimizer, user)
    optimizer.abort_step()
    assert all(torch.equal(p, w) for p, w in zip(user.params, before, strict=True))
    assert not own.state
    optimizer.zero_grad()
    own.step()
    assert all(torch.equal(p, w) for p, w in zip(user.params, before, strict=True))
    optimizer.step(user.closure)
    own.step()
    assert not torch.equal(user.params[-1], before[-1])
