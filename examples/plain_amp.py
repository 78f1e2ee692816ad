"""Plain PyTorch with mixed precision: float16 autocast and a GradScaler, here on the CPU."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from lookbehind_fused import Lookbehind

torch.manual_seed(0)
digits = load_digits()
inputs, targets = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
test_inputs, test_targets = inputs[1400:], targets[1400:]

device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
loss_fn = nn.CrossEntropyLoss()
scaler = torch.amp.GradScaler(device, init_scale=2.0**22)
optimizer = Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, k=2, scaler=scaler)

undone = 0
for epoch in range(5):
    for indices in torch.randperm(1400).split(50):
        batch, labels = inputs[indices].to(device), targets[indices].to(device)

        def closure(batch=batch, labels=labels):
            with torch.autocast(device, torch.float16):
                loss = loss_fn(model(batch), labels)
            scaler.scale(loss).backward()
            return loss

        loss = scaler.step(optimizer, closure)  # the loss of evaluation 0
        scaler.update()
        undone += optimizer.diagnostics["skipped"]
    print(f"epoch {epoch}: loss {loss.item():.3f}, scale {scaler.get_scale():.0f}, steps undone {int(undone)}")

with torch.no_grad():
    correct = model(test_inputs.to(device)).argmax(1).cpu() == test_targets
print(f"accuracy {correct.float().mean():.3f}")
