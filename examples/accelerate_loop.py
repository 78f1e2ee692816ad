"""Accelerate: gradients are accumulated in its own way, and the closure runs the microbatches of the step again."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lookbehind_fused import Lookbehind
from lookbehind_fused.integrations.accelerate import connect

torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
training, test = random_split(data, [1400, len(data) - 1400])

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, k=2, max_grad_norm=5.0)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5 * 28)
loader = DataLoader(training, batch_size=25, shuffle=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
optimizer = connect(optimizer)  # its scaler, settings through the wrapper, and step_was_skipped

microbatches = []  # of the step at hand


def evaluate(inputs, targets):
    """Forward and backward."""
    loss = nn.functional.cross_entropy(model(inputs), targets)
    accelerator.backward(loss)
    return loss


def closure():
    """The evaluations after the first."""
    for inputs, targets in microbatches:
        evaluate(inputs, targets)


optimizer.closure = closure
for epoch in range(5):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            microbatches.append((inputs, targets))
            loss = evaluate(inputs, targets)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            microbatches.clear()
    print(f"epoch {epoch}: loss {loss.item():.3f}, lr {scheduler.get_last_lr()[0]:.3f}")

model.eval()
with torch.no_grad():
    correct = torch.cat([model(x).argmax(1) == y for x, y in DataLoader(test, batch_size=400)])
print(f"accuracy {correct.float().mean():.3f}")
