"""skorch: the optimizer is named, nothing else; accumulated batches need the mix-in."""

import numpy
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping
from torch import nn

from lookbehind_fused import Lookbehind
from lookbehind_fused.integrations.skorch import WholeSteps


class Net(WholeSteps, NeuralNetClassifier):
    """With ``accumulation`` batches a step."""


class Layers(nn.Sequential):
    """A small classifier."""

    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.Softmax(dim=1))


torch.manual_seed(0)
inputs, targets = load_digits(return_X_y=True)
inputs = (inputs / 16).astype(numpy.float32)
inputs, test_inputs, targets, test_targets = train_test_split(inputs, targets, test_size=400, random_state=0)

settings = {
    "optimizer": Lookbehind,
    "optimizer__base_optimizer": torch.optim.SGD,
    "optimizer__momentum": 0.9,
    "optimizer__rho": 0.1,
    "optimizer__k": 2,
    "lr": 0.1,
    "max_epochs": 5,
    "verbose": 0,
}
net = NeuralNetClassifier(Layers, batch_size=50, **settings).fit(inputs, targets)
print(f"batches of 50: loss {net.history[-1, 'train_loss']:.3f}, accuracy {net.score(test_inputs, test_targets):.3f}")

clipping = [GradientNormClipping(5.0)]
net = Net(Layers, batch_size=25, accumulation=2, callbacks=clipping, **settings).fit(inputs, targets)
print(f"two batches of 25 a step: loss {net.history[-1, 'train_loss']:.3f}")
print(f"accuracy {net.score(test_inputs, test_targets):.3f}")
