"""Lightning's FSDP2 strategy, on CPUs or GPUs: ``python examples/lightning_fsdp2.py`` starts two processes, or those of
``torchrun --nproc_per_node 2`` take part. The callback takes care of accumulation, clipping and logs.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lookbehind_fused import Lookbehind
from lookbehind_fused.integrations.lightning import WholeSteps


class Digits(LightningModule):
    """A small classifier."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def configure_model(self):
        if isinstance(self.layers, FSDPModule):  # Lightning calls this more than once
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.layers[0], self.layers[2], self.layers):
            fully_shard(layer, mesh=mesh)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.layers(inputs), targets)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)  # of evaluation 0 alone
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        accuracy = (self.layers(inputs).argmax(1) == targets).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self):  # after configure_model, of the parameters that there are then
        return Lookbehind(self.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9, rho=0.1, k=2)


seed_everything(0, verbose=False)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
training, test = torch.utils.data.random_split(data, [1400, len(data) - 1400])

trainer = Trainer(
    accelerator="gpu" if torch.cuda.is_available() else "cpu",
    devices=2,
    strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    max_epochs=5,
    accumulate_grad_batches=2,
    gradient_clip_val=5.0,
    callbacks=[WholeSteps()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
model = Digits()
trainer.fit(model, DataLoader(training, batch_size=12, shuffle=True), DataLoader(test, batch_size=200))
if trainer.is_global_zero:
    print(f"loss {trainer.callback_metrics['loss']:.3f}, {trainer.global_step} steps")
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
