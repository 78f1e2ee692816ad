"""Lightning, automatic optimization: the callback takes care of accumulation, clipping, mixed precision and logs."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lookbehind_fused import LambdaSchedule, Lookbehind
from lookbehind_fused.integrations.lightning import WholeSteps


class Digits(LightningModule):
    """A small classifier."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.layers(inputs), targets)
        self.log("loss", loss, on_step=False, on_epoch=True)  # of evaluation 0 alone
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("accuracy", (self.layers(inputs).argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        optimizer = Lookbehind(self.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9, rho=0.1, k=2)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        radius = LambdaSchedule(optimizer, rho=lambda epoch: min(1.0, (1 + epoch) / 3))
        return [optimizer], [rate, radius]


seed_everything(0, verbose=False)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
training, test = torch.utils.data.random_split(data, [1400, len(data) - 1400])

# On a GPU precision="16-mixed" is the one word more.
trainer = Trainer(
    accelerator="cpu",
    max_epochs=5,
    accumulate_grad_batches=2,
    gradient_clip_val=5.0,
    callbacks=[WholeSteps()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Digits(), DataLoader(training, batch_size=25, shuffle=True), DataLoader(test, batch_size=400))
print(f"loss {trainer.callback_metrics['loss']:.3f}, {trainer.global_step} steps")
print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
