"""FSDP2: ``torchrun --nproc_per_node 2 examples/fsdp2.py --checkpoints digits``, on CPUs or GPUs. Started again, on as
many ranks or on others, it goes on from the last checkpoint in that folder.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

from lookbehind_fused import Lookbehind

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoints", type=Path)
parser.add_argument("--epochs", type=int, default=5)
arguments = parser.parse_args()

with_gpus = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if with_gpus else torch.device("cpu")
if with_gpus:
    torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
training, test = random_split(data, [1400, len(data) - 1400])
sampler = DistributedSampler(training)
loader = DataLoader(training, batch_size=25, sampler=sampler)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
for layer in (model[0], model[2], model):
    fully_shard(layer, mesh=mesh)
# After the sharding, of the parameters that there are then; clips by the norm over all ranks.
optimizer = Lookbehind(model.parameters(), torch.optim.AdamW, lr=1e-2, rho=0.1, k=2, max_grad_norm=1.0)


def state(epoch):
    """What is saved, and loaded in place."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "epoch": epoch}


first_epoch = 0
complete = sorted(arguments.checkpoints.glob("*/.metadata")) if arguments.checkpoints else []  # which is written last
if complete:
    saved = state(first_epoch)
    dcp.load(saved, checkpoint_id=complete[-1].parent)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    first_epoch = saved["epoch"]

for epoch in range(first_epoch, arguments.epochs):
    sampler.set_epoch(epoch)
    for inputs, targets in loader:
        inputs, targets = inputs.to(device), targets.to(device)

        def closure(inputs=inputs, targets=targets):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # on every rank: all of them take the step, or none
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    if arguments.checkpoints:
        dcp.save(state(epoch + 1), checkpoint_id=arguments.checkpoints / f"epoch-{epoch + 1:04}")

with torch.no_grad():  # on every rank too, since the forward pass gathers weights
    correct = [model(x.to(device)).argmax(1) == y.to(device) for x, y in DataLoader(test, batch_size=400)]
if dist.get_rank() == 0:
    print(f"accuracy {torch.cat(correct).float().mean():.3f}")
dist.destroy_process_group()
