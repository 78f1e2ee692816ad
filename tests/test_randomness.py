"""``same_randomness``: every evaluation of a step draws what evaluation 0 has drawn."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM, Lookahead, Lookbehind, MultistepSAM
from lookbehind_fused.program import Evaluation
from tests.twin import BASES


class Job:
    """A network with dropout, and noise added to its minibatch."""

    def __init__(self, make: Callable[..., Any], base: str, backend: str, **options: Any) -> None:
        torch.manual_seed(0)
        kind, settings = BASES[base]
        self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)).double()
        self.inputs, self.targets = torch.randn(12, 6).double(), torch.randn(12, 3).double()
        self.optimizer = make(self.model.parameters(), kind, rho=0.1, backend=backend, **options, **settings)
        self.drawn: list[Tensor] = []

    def closure(self, evaluation: Evaluation | None = None) -> Tensor:
        noise = torch.rand(self.inputs.shape)
        self.drawn.append(noise)
        inputs, targets = self.inputs + noise, self.targets
        if evaluation is not None:
            inputs, targets = evaluation.part(inputs), evaluation.part(targets)
        loss = (self.model(inputs) - targets).square().mean()
        loss.backward()
        return loss.detach()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("form", ["step", "evaluations"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("base", ["momentum", "AdamW", "RMSprop"])
def test_k_plus_1_and_2k_evaluations_give_the_same_bits(backend: str, base: str, k: int, form: str) -> None:
    """A reused gradient is then that of the same dropout masks as if it were evaluated again; without it is not."""
    results = {}
    for same in (True, False):
        for reuse in (True, False):
            job = Job(Lookbehind, base, backend, k=k, reuse_gradient=reuse, same_randomness=same)
            for number in range(3):
                torch.manual_seed(number)  # 2k evaluations of the step before have not drawn more
                if form == "step":
                    job.optimizer.step(job.closure)
                else:
                    for _ in job.optimizer.evaluations():
                        job.closure()
            results[same, reuse] = job.weights()
            per_step = k + 1 if reuse else 2 * k
            for step in range(3):
                drawn = job.drawn[step * per_step : (step + 1) * per_step]
                assert all(torch.equal(drawn[0], other) for other in drawn[1:]) == same
            assert not torch.equal(job.drawn[0], job.drawn[-1])
    assert all(map(torch.equal, results[True, True], results[True, False]))
    if k > 1:
        assert not any(map(torch.equal, results[False, True], results[False, False]))


def test_each_microbatch_has_its_own(backend: str) -> None:
    job = Job(Lookbehind, "momentum", backend, k=2, microbatches=2, same_randomness=True)
    parts: list[int] = []

    def closure(evaluation: Evaluation) -> Tensor:
        parts.append(evaluation.microbatch)
        return job.closure(evaluation)

    job.optimizer.step(closure)
    first = [job.drawn[parts.index(part)] for part in (0, 1)]
    assert not torch.equal(*first)
    assert all(torch.equal(drawn, first[part]) for part, drawn in zip(parts, job.drawn, strict=True))


def test_the_next_step_draws_anew_and_as_it_would_after_one_evaluation(backend: str) -> None:
    job = Job(MultistepSAM, "SGD", backend, k=3, same_randomness=True)
    torch.manual_seed(7)
    job.optimizer.step(job.closure)
    after = torch.rand(3)
    torch.manual_seed(7)
    job.closure()
    assert torch.equal(after, torch.rand(3))


def test_it_is_a_setting_that_is_saved(backend: str) -> None:
    job = Job(lambda *a, **o: Lookahead(SAM(*a, **o), 2), "momentum", backend, same_randomness=True)
    other = Job(lambda *a, **o: Lookahead(SAM(*a, **o), 2), "momentum", backend)
    other.optimizer.load_state_dict(job.optimizer.state_dict())
    assert other.optimizer.same_randomness is True
    with pytest.raises(TypeError, match="^same_randomness: expected True or False, got 1"):
        SAM(job.model.parameters(), torch.optim.SGD, lr=0.1, same_randomness=1, backend=backend)


def test_pairs_are_refused_since_the_random_state_of_their_gradients_is_gone(backend: str) -> None:
    job = Job(SAM, "momentum", backend, same_randomness=True)
    before = job.weights()
    job.closure()
    with pytest.raises(RuntimeError, match=r"^ascent_step\(\): expected same_randomness=False"):
        job.optimizer.first_step()
    assert all(map(torch.equal, job.weights(), before))
