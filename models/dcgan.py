"""The baseline: DCGAN (Radford, Metz, Chintala, "Unsupervised representation learning with deep convolutional generative
adversarial networks", ICLR 2016), conditional on a label where asked.

The layers stand in the order of the well-known public example, so that its plain state_dicts can be taken over (``from_legacy``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from models.config import ModelConfig
from models.layers import BatchNorm

# What a doubling by bilinear interpolation looks like as a 4x4 transposed convolution.
_SMOOTH = torch.outer(*[torch.tensor([0.25, 0.75, 0.75, 0.25])] * 2)


def _initialise(module: nn.Module) -> None:
    """The paper's initialisation: N(0, 0.02) for convolutions, N(1, 0.02) for batch-norm scales.

    Layers that double the size start as smooth ones: one random number for each pair of feature maps, times a bilinear kernel of
    the same variance. Independent weights would paint a checkerboard first, which takes thousands of steps to unlearn.
    """
    if isinstance(module, nn.ConvTranspose2d) and module.stride == (2, 2):
        nn.init.normal_(module.weight, 0.0, 0.02)
        with torch.no_grad():
            module.weight.copy_(module.weight[:, :, :1, :1] * _SMOOTH / _SMOOTH.square().mean().sqrt())
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class DCGANGenerator(nn.Module):
    """z (N, latent_dim), labels (N,) -> images (N, 3, S, S) in [-1, 1]. The label enters beside z, as one-hot."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        widths = config.g_channels
        layers: list[nn.Module] = [nn.ConvTranspose2d(config.latent_dim + config.num_classes, widths[0], 4, 1, 0, bias=False)]
        for before, after in zip(widths, (*widths[1:], 3), strict=True):
            layers += [BatchNorm(before), nn.ReLU(inplace=True), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.apply(_initialise)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.config.num_classes:
            z = torch.cat([z, F.one_hot(labels, self.config.num_classes).to(z.dtype)], dim=1)
        return self.main(z[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """images (N, 3, S, S), labels (N,) -> logits (N,).

    The label enters by projection on the pooled last features (Miyato and Koyama, "cGANs with projection discriminator", 2018).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        widths = config.d_channels
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), BatchNorm(after), nn.LeakyReLU(0.2, inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False)
        self.apply(_initialise)
        self.projection = nn.Embedding(config.num_classes, widths[-1]) if config.num_classes else None
        if self.projection is not None:
            nn.init.zeros_(self.projection.weight)

    def look(self, images: Tensor) -> list[Tensor]:
        """The images as they are."""
        return [images]

    def judge(self, maps: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """[images], labels -> logits (N,)."""
        features = self.features(maps[0])
        logits = self.head(features).flatten()
        if self.projection is not None:
            logits = logits + (self.projection(labels) * features.mean(dim=(2, 3))).sum(dim=1)
        return logits

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.judge(self.look(images), labels)


def from_legacy(generator: dict[str, Tensor], discriminator: dict[str, Tensor] | None) -> tuple[ModelConfig, dict, dict | None]:
    """Take over plain DCGAN state_dicts whatever their key names: (config, generator state, discriminator state or None).

    Expects the public layout: a 4x4 transposed convolution from z, then batch norm and 4x4 stride-2 transposed convolutions, no
    biases; the mirror image for the discriminator. Raises UserError when the tensors have other shapes.
    """
    convolutions = [value for value in generator.values() if value.ndim == 4]
    if len(convolutions) < 3 or any(value.shape[2:] != (4, 4) for value in convolutions) or convolutions[-1].shape[1] != 3:
        raise UserError(
            "the file is a state_dict, but not one of a plain DCGAN generator with 4x4 kernels; give a checkpoint of train.py"
        )
    widths = tuple(value.shape[1] for value in convolutions[:-1])
    image_size = 4 * 2 ** len(widths)
    config = ModelConfig("dcgan", image_size, convolutions[0].shape[0], 0, widths, widths[::-1])
    if discriminator is not None:
        config = ModelConfig(
            "dcgan",
            image_size,
            config.latent_dim,
            0,
            widths,
            tuple(value.shape[0] for value in discriminator.values() if value.ndim == 4)[:-1],
        )
    networks = DCGANGenerator(config), DCGANDiscriminator(config)
    g_state = _by_order(networks[0], generator, "generator")
    return config, g_state, None if discriminator is None else _by_order(networks[1], discriminator, "discriminator")


def _by_order(network: nn.Module, state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    wanted = network.state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in wanted.values()]:
        raise UserError(f"the {what}'s tensors do not have a plain DCGAN's shapes; give a checkpoint of train.py instead")
    return dict(zip(wanted, state.values(), strict=True))
