"""The loop of timm's train.py and torchvision's references: backward, clipping, step() without a closure, an average
of the weights (EMA). Marked lines are those that such a script adds.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lookbehind_fused import Lookbehind

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
targets = torch.tensor(digits.target)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
)
loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = Lookbehind(
    model.parameters(), torch.optim.AdamW, lr=3e-3, rho=0.05, k=2,
    max_grad_norm=1.0,  # the evaluations after the first, which the loop does not clip
    buffers_at_slow=model,  # BatchNorm's statistics are those of the evaluations that the loop makes
)  # fmt: skip
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
accumulation, microbatches = 2, []


def evaluate_again():
    """All microbatches of the step, at the perturbed weights."""
    for inputs, labels in microbatches:
        (loss_fn(model(inputs), labels) / accumulation).backward()


optimizer.closure = evaluate_again  # the line that makes step() take its other gradients

for epoch in range(4):
    for index, indices in enumerate(torch.randperm(1400).split(25)):
        inputs, labels = images[indices], targets[indices]
        microbatches.append((inputs, labels))  # what they are evaluated on
        loss = loss_fn(model(inputs), labels)
        (loss / accumulation).backward()
        if (index + 1) % accumulation:
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        microbatches.clear()
        average.update_parameters(model)  # of the weights between two steps, which are the slow ones
    print(f"epoch {epoch}: loss {loss.item():.3f}")

average.eval()
with torch.no_grad():
    correct = average(images[1400:]).argmax(1) == targets[1400:]
print(f"accuracy {correct.float().mean():.3f}")
