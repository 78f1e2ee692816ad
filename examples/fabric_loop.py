"""Fabric: the closure of any loop. With a GradScaler ("16-mixed") see the last lines of the loop."""

import torch
from lightning.fabric import Fabric, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lookbehind_fused import Lookbehind

seed_everything(0, verbose=False)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
training, test = torch.utils.data.random_split(data, [1400, len(data) - 1400])

fabric = Fabric(accelerator="cpu", devices=1)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, k=2, max_grad_norm=5.0)
scaler = getattr(fabric.strategy.precision, "scaler", None)
model, optimizer = fabric.setup(model, optimizer)
loader = fabric.setup_dataloaders(DataLoader(training, batch_size=50, shuffle=True))
optimizer.scaler = scaler  # settings reach the optimizer through Fabric's wrapper

for epoch in range(5):
    for inputs, targets in loader:

        def closure(inputs=inputs, targets=targets):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            fabric.backward(loss)
            return loss

        if scaler is None:
            loss = optimizer.step(closure)  # the loss of evaluation 0
        else:  # torch's scalers take no closure from Fabric: evaluation 0 is the gradients that are there
            optimizer.closure = closure
            loss = closure()
            optimizer.step()
            optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    correct = torch.cat([model(x).argmax(1) == y for x, y in DataLoader(test, batch_size=400)])
print(f"accuracy {correct.float().mean():.3f}")
