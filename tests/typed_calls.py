"""Calls as users write them, for mypy: nothing here runs. A line that ends with ``# error: CODE`` is wrong, and mypy is
to say so with that code; of every other line it is to say nothing (``test_types.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lookbehind_fused
from lookbehind_fused import (
    ASAM,
    SAM,
    Evaluation,
    LambdaSchedule,
    Lookahead,
    Lookbehind,
    MultistepSAM,
    buffers_at_slow,
    compat,
    weight_scaling,
)
from lookbehind_fused.analysis import sharpness

SGD = torch.optim.SGD
model = nn.Linear(3, 2)
scaler = torch.amp.GradScaler("cpu")


def closure() -> Tensor:
    loss: Tensor = model(torch.ones(3)).sum()
    loss.backward()
    return loss


def of_one(evaluation: Evaluation) -> Tensor:
    return evaluation.part(torch.ones(4, 3)).sum()


# ---- a class as base -------------------------------------------------------------------------------------------------

Lookbehind(model.parameters(), SGD, lr=0.1, momentum=0.9)
Lookbehind(model.named_parameters(), torch.optim.AdamW, lr=0.1, k=3, alpha="adaptive", alpha_scope="tensor")
Lookbehind(model.parameters(), SGD, lr=torch.tensor(0.1), closure=closure)
Lookbehind(
    [weight_scaling(model, lr=0.1), {"params": [model.bias]}], SGD, max_grad_norm=1.0, scaler=scaler, closure=closure
)
SAM(model.parameters(), SGD, 0.05, True, lr=0.1)
ASAM(model.parameters(), SGD, 0.5, eta=0.01, lr=0.1)
MultistepSAM(model.parameters(), SGD, k=3, average=True, lr=0.1)
Lookahead(SGD, params=model.parameters(), lr=0.1, k=5)
compat.SingleFileSAM(model.parameters(), SGD, 0.05, lr=0.1)

Lookbehind(None, SGD, lr=0.1)  # error: call-overload
Lookbehind(SGD, lr=0.1)  # error: call-overload
Lookbehind(model, SGD, lr=0.1)  # error: call-overload
Lookbehind(model.parameters(), "SGD", lr=0.1)  # error: call-overload
Lookbehind(model.parameters(), SGD, 0.05, lr=0.1)  # error: call-overload
Lookbehind(model.parameters(), SGD, lr=0.1, k=2.5)  # error: call-overload
Lookbehind(model.parameters(), SGD, lr=0.1, rho="0.05")  # error: call-overload
Lookbehind(model.parameters(), SGD, lr=0.1, ascent_fraction="1/4")  # error: call-overload
Lookbehind(model.parameters(), SGD, lr=0.1, buffers_at_slow=True)  # error: call-overload
SAM(None, SGD, lr=0.1)  # error: call-overload
ASAM(model.parameters(), SGD, "0.5")  # error: call-overload
MultistepSAM(model.parameters(), SGD, 0.05)  # error: call-overload
Lookahead(SGD, k=5, lr=0.1)  # error: call-overload

# ---- an instance as base ---------------------------------------------------------------------------------------------

base = SGD(model.parameters(), lr=0.1)
optimizer = Lookbehind(None, base, rho=0.1, k=3, nonfinite="skip", backend="native")
Lookbehind(model.parameters(), base, ascent_rho=0.1, buffers_at_slow=model, model=model)
SAM(None, base, 0.05, adaptive=True, microbatches=2)
SAM(None, base, ascent_fraction=0.25)
ASAM(None, base, 0.5, eta=0.01)
MultistepSAM(None, base, k=3, adaptive=True, eta=0.1, average=True, ascent_fraction=0.5)
Lookahead(base, 5, 0.5)
compat.LookbehindSAM(base, model, rho=0.05, k_steps=5, alpha=-1)

Lookbehind(None, base, lr=0.1)  # error: call-overload
Lookbehind(None, base, momentun=0.9)  # error: call-overload
Lookbehind(None, base, alhpa=0.5)  # error: call-overload
SAM(None, base, lr=0.1)  # error: call-overload
SAM(None, base, k=2)  # error: call-overload
ASAM(None, base, adaptive=True)  # error: call-overload
MultistepSAM(None, base, alpha=0.5)  # error: call-overload
Lookahead(base, params=model.parameters())  # error: call-overload
Lookahead(base, lr=0.1)  # error: call-overload
compat.LookbehindSAM(base, k_steps=5)  # error: call-arg
compat.LookbehindSAM(base, model, rho="0.05")  # error: arg-type

# ---- steps, and what can be read -------------------------------------------------------------------------------------

optimizer.step(closure)
optimizer.step(of_one)
optimizer.closure = closure
optimizer.scaler = scaler
optimizer.loss_scale = torch.tensor(8.0)
optimizer.alpha = "adaptive"
for evaluation in optimizer.evaluations(apply=False):
    optimizer.apply(evaluation)
    number: int = evaluation.index
norm: Tensor = optimizer.diagnostics["grad_norm"]
held: int = optimizer.memory()["slow"]
slow: dict[Tensor, Tensor] = optimizer.slow_weights()
lr: float = optimizer.param_groups[0]["lr"]
LambdaSchedule(optimizer, rho=lambda step: min(1.0, step / 10), alpha=lambda step: "adaptive").step()
torch.optim.lr_scheduler.StepLR(optimizer, 10).step()
version: str = lookbehind_fused.__version__
with buffers_at_slow(model):
    closure()

optimizer.step(closure())  # error: arg-type
optimizer.k = "3"  # error: assignment
optimizer.max_grad_nrm = 1.0  # error: attr-defined
due: int = optimizer.evaluation.index  # error: union-attr
optimizer.apply(0)  # error: arg-type
LambdaSchedule(base, rho=lambda step: 1.0)  # error: arg-type
LambdaSchedule(optimizer, rho=0.1)  # error: arg-type
buffers_at_slow(None)  # error: arg-type
sharpness(model)  # error: call-arg
