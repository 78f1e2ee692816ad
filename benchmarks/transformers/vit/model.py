"""A small vision transformer."""

import torch
from torch import Tensor, nn


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021): patches, a class token, learned positions, LayerNorm before each
    block.

    Args:
        channels, size: of the images, which are square; `size` is a multiple of `patch`.
        patch: the patches' edge, in pixels.
        classes: how many logits.
        width: of a token's vector; a multiple of `heads`.
        depth: layers.
        heads: of every attention.
    """

    def __init__(
        self, channels: int, size: int, patch: int, classes: int, width: int, depth: int, heads: int
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, channels, size, size) to logits (N, classes)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.positions
        return self.head(self.layers(tokens)[:, 0])
