"""DistributedDataParallel: ``torchrun --nproc_per_node 2 examples/ddp.py --checkpoint digits.pt``, on CPUs or GPUs.
Started again, it goes on from the checkpoint, which every rank reads.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

from lookbehind_fused import Lookbehind

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path)
parser.add_argument("--epochs", type=int, default=5)
arguments = parser.parse_args()

with_gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if with_gpus else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if with_gpus else torch.device("cpu")
if with_gpus:
    torch.cuda.set_device(device)

torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
training, test = random_split(data, [1400, len(data) - 1400])
sampler = DistributedSampler(training)
loader = DataLoader(training, batch_size=25, sampler=sampler)

layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
model = DistributedDataParallel(layers, device_ids=[device.index] if with_gpus else None)
optimizer = Lookbehind(
    model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, k=2, max_grad_norm=5.0,
    # The default "synced" ascends with the mean over ranks, and waits for it at each of the k + 1 evaluations.
    ascents="local", model=model,
)  # fmt: skip

first_epoch = 0
if arguments.checkpoint and arguments.checkpoint.exists():
    saved = torch.load(arguments.checkpoint, map_location=device)
    layers.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first_epoch = saved["epoch"]

for epoch in range(first_epoch, arguments.epochs):
    sampler.set_epoch(epoch)
    for inputs, targets in loader:
        inputs, targets = inputs.to(device), targets.to(device)

        def closure(inputs=inputs, targets=targets):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # of this rank's examples
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}")
        if arguments.checkpoint:
            saved = {"model": layers.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(saved, f"{arguments.checkpoint}.new")
            os.replace(f"{arguments.checkpoint}.new", arguments.checkpoint)  # at no time is there a half of one

if dist.get_rank() == 0:
    with torch.no_grad():
        correct = [layers(x.to(device)).argmax(1) == y.to(device) for x, y in DataLoader(test, batch_size=400)]
    print(f"accuracy {torch.cat(correct).float().mean():.3f}")
dist.destroy_process_group()
