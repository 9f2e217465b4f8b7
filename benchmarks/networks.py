"""The networks of both stages as one would write them for torch, untrained; images are [n, channels, side, side]."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from training import Recipe

WIDEST = 1024  # channels


def _conv(recipe: Recipe, wide: int, to: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(wide, to, recipe.kernel, stride, padding=recipe.kernel // 2)


class Block(nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """A residual block with a convolved shortcut."""

    def __init__(self, recipe: Recipe, width: int) -> None:
        super().__init__()
        momentum = 1 - recipe.batch_norm_momentum
        layers = [
            layer
            for _ in range(recipe.depth_per_block)
            for layer in (nn.BatchNorm2d(width, momentum=momentum), nn.ReLU(), _conv(recipe, width, width))
        ]
        self.body, self.shortcut = nn.Sequential(*layers), _conv(recipe, width, width)

    def forward(self, x: Any) -> Any:
        return self.body(x) + self.shortcut(x)


def _blocks(recipe: Recipe, width: int) -> list[nn.Module]:
    return [Block(recipe, width) for _ in range(recipe.blocks_per_scale)]


class Encoder(nn.Module):  # type: ignore[misc]
    """Stage 1's, variational: images in [0, 1] to mean and log_sd, each [n, latent_dim]."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        widths = [recipe.base_dim << scale for scale in range(recipe.num_scale)]
        layers = [_conv(recipe, recipe.channels, widths[0]), *_blocks(recipe, widths[0])]
        for pair in pairwise(widths):
            layers += [_conv(recipe, *pair, 2), *_blocks(recipe, pair[1])]
        self.convolutions = nn.Sequential(*layers)
        self.dense = nn.Sequential(
            nn.ReLU(), nn.Linear(widths[-1], recipe.fc_dim), nn.ReLU(), nn.Linear(recipe.fc_dim, recipe.fc_dim)
        )
        self.shortcut = nn.Linear(widths[-1], recipe.fc_dim)
        self.statistics = nn.Linear(recipe.fc_dim, 2 * recipe.latent_dim)

    def forward(self, images: Any) -> tuple[Any, Any]:
        x = self.convolutions(images).mean((2, 3))
        mean, log_sd = self.statistics(self.dense(x) + self.shortcut(x)).float().chunk(2, 1)
        return mean, log_sd


class Decoder(nn.Module):  # type: ignore[misc]
    """Stage 1's: latents to images in [0, 1]."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        scales = recipe.side.bit_length() - 1
        widths = [min(recipe.base_dim * recipe.side >> power, WIDEST) for power in range(1, scales)]
        self.stem = nn.Linear(recipe.latent_dim, 4 * widths[0])
        layers: list[nn.Module] = []
        for pair in pairwise([*widths, recipe.base_dim]):
            up = nn.ConvTranspose2d(*pair, recipe.kernel, 2, padding=recipe.kernel // 2, output_padding=1)
            layers += [up, *_blocks(recipe, pair[1])]
        self.up, self.pixels = nn.Sequential(*layers), _conv(recipe, recipe.base_dim, recipe.channels)

    def forward(self, latents: Any) -> Any:
        x = self.stem(latents).view(len(latents), 2, 2, -1).permute(0, 3, 1, 2)
        return torch.sigmoid(self.pixels(self.up(x)).float())


class Chain(nn.Module):  # type: ignore[misc]
    """What is exported: noise to uint8 pixels [n, side, side, channels]."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        wide = [recipe.latent_dim, *[recipe.second_dim] * recipe.second_depth]
        dense = [layer for pair in pairwise(wide) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.dense = nn.Sequential(*dense)
        self.latents = nn.Linear(recipe.latent_dim + recipe.second_dim, recipe.latent_dim)
        self.decoder = Decoder(recipe)

    def forward(self, noise: Any) -> Any:
        latents = 1.1 * self.latents(torch.cat([noise, self.dense(noise)], 1))
        pixels = (255 * self.decoder(latents)).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous()
