"""The network of the main job: a small residual network for images of any size."""

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut; `stride` 2 halves the image."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """`stages` of `depth` blocks; the first has `width` channels, each other twice those of the one before.

    All stages but the first halve the image. The head averages over what is left of it, so 8x8 digits, 28x28 clothes
    and 32x32 photographs differ only in `channels` here. Width 64, depth 2 and 4 stages are ResNet-18 for small images.
    """

    def __init__(self, channels: int, classes: int, width: int = 16, depth: int = 1, stages: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        channels_in = width
        for stage in range(stages):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(channels_in, width << stage, stride))
                channels_in = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) to logits (N, classes)."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        # mean, not adaptive pooling: the backward of that is not deterministic on CUDA
        return self.head(x.mean((2, 3)))
