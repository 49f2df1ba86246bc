"""Discriminators of the improved model. Each is two steps: ``look`` (images -> maps) and ``judge`` (maps, labels -> logits (N, K)).

What ``look`` returns is what gradient penalties are taken with respect to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig, View
from models.features import Lite0
from models.layers import SelfAttention, activate, minibatch_deviation, plain, reduced, spectral


class Block(nn.Module):
    """Residual block that halves the size: a 3x3 convolution and a strided 4x4 one, beside an average-pooled 1x1."""

    def __init__(self, inputs: int, outputs: int, normalise):
        super().__init__()
        self.first = normalise(nn.Conv2d(inputs, inputs, 3, padding=1))
        self.second = normalise(nn.Conv2d(inputs, outputs, 4, 2, padding=1))
        self.skip = normalise(nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, maps: Tensor) -> Tensor:
        new = self.second(activate(self.first(activate(maps))))
        return (self.skip(F.avg_pool2d(maps, 2)) + new) * math.sqrt(0.5)


class Verdict(nn.Module):
    """Maps (N, C, H, W) -> logits (N, 1): minibatch deviation, a convolution, and the label by projection (Miyato 2018)."""

    def __init__(self, channels: int, num_classes: int, normalise):
        super().__init__()
        self.conv = normalise(nn.Conv2d(channels + 1, channels, 3, padding=1))
        self.out = normalise(nn.Linear(channels, 1))
        self.projection = normalise(nn.Embedding(num_classes, channels)) if num_classes else None

    def forward(self, maps: Tensor, labels: Tensor | None) -> Tensor:
        pooled = activate(self.conv(minibatch_deviation(maps))).mean(dim=(2, 3))
        logits = self.out(pooled)
        if self.projection is not None:
            logits = logits + (self.projection(labels) * pooled).sum(dim=1, keepdim=True) / math.sqrt(pooled.shape[1])
        return logits


class Growing(nn.Module):
    """A discriminator that sees what a View says: images at the resolution that the generator has reached, or windows of them.

    growth: log2 of the side seen, fractions while it fades in; it travels in the state_dict.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.growth = self._full = math.log2(config.seen)
        self._labels = max(1, config.num_classes)
        self.kinds = 2 * self._labels if config.window else config.num_classes  # windows are kinds of their own
        self._windowed, self._share = False, None

    def get_extra_state(self) -> float:
        return self.growth

    def set_extra_state(self, state: float) -> None:
        self.growth = float(state)

    def set_view(self, view: View) -> None:
        """What comes next."""
        self.growth = math.log2(view.side) if view.windowed else view.growth
        self._windowed, self._share = view.windowed, None if view.windowed else view.share

    @property
    def fade(self) -> float | Tensor:
        """How far the resolution that is seen has faded in."""
        return View(self.growth, share=self._share).fade

    @property
    def skipped(self) -> int:
        """Doublings that are not used for images of this size."""
        return int(self._full - math.ceil(self.growth))

    def reached(self, images: Tensor) -> Tensor:
        """The images at the size to be seen."""
        return reduced(images, 2 ** math.ceil(self.growth))

    def kind(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """What the verdict is asked about: the label, and whether this is a window. (N,) or None."""
        if self.kinds <= self._labels:
            return labels
        known = torch.zeros(count, dtype=torch.long, device=device) if labels is None else labels
        return known + self._labels if self._windowed else known

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Verdict on whole images of any size."""
        before, self._windowed = self._windowed, False
        try:
            return self.judge(self.look(images), labels)
        finally:
            self._windowed = before


class ResidualDiscriminator(Growing):
    """images (N, 3, S, S), labels (N,) -> logits (N, 1), from the pixels alone."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        normalise = spectral if config.spectral_norm else plain
        widths = config.d_channels
        self.enter = nn.ModuleList(normalise(nn.Conv2d(3, width, 1)) for width in widths[:-1])
        self.blocks = nn.ModuleList(Block(a, b, normalise) for a, b in zip(widths[:-1], widths[1:], strict=True))
        sizes = [config.seen // 2 ** (k + 1) for k in range(len(self.blocks))]
        self.attention = nn.ModuleList(
            SelfAttention(width, normalise) if size in config.attention else nn.Identity()
            for size, width in zip(sizes, widths[1:], strict=True)
        )
        self.verdict = Verdict(widths[-1], self.kinds, normalise)

    def look(self, images: Tensor) -> list[Tensor]:
        """The images alone."""
        return [self.reached(images)]

    def judge(self, maps: list[Tensor], labels: Tensor | None = None) -> Tensor:
        images = maps[0]
        first = self.skipped
        fade = self.fade
        hidden = self.attention[first](self.blocks[first](self.enter[first](images)))
        if torch.is_tensor(fade) or fade < 1.0:
            hidden = torch.lerp(self.enter[first + 1](F.avg_pool2d(images, 2)), hidden, fade)
        for block, attention in zip(self.blocks[first + 1 :], self.attention[first + 1 :], strict=True):
            hidden = attention(block(hidden))
        return self.verdict(activate(hidden), self.kind(labels, len(images), images.device))


class Mixing(nn.Module):
    """Random, frozen mixing of feature maps across channels and scales (Sauer et al., "Projected GANs converge faster", 2021).

    Deep maps are enlarged and added to the next finer ones, so that no feature can be ignored by the discriminators.
    """

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        self.across = nn.ModuleList(nn.Conv2d(count, width, 1, bias=False) for count in channels)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in channels[:-1])
        for layer in (*self.across, *self.down):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        self.requires_grad_(False)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        mixed = [layer(item) for layer, item in zip(self.across, maps, strict=True)]
        results = [mixed[-1]]
        for layer, item in zip(reversed(self.down), reversed(mixed[:-1]), strict=True):
            coarse = F.interpolate(results[0], size=item.shape[2:], mode="bilinear", align_corners=False)
            results.insert(0, (layer(coarse) + item) * math.sqrt(0.5))
        return results


class Head(nn.Module):
    """Maps of one scale (N, C, H, W) -> logits (N, 1): halvings to 4x4, then a verdict.

    Smaller images come with smaller maps while they grow, and a map of 1x1 is halved no more.
    """

    def __init__(self, inputs: int, side: int, width: int, num_classes: int, normalise):
        super().__init__()
        layers, count = [], inputs
        while side > 4:
            layers += [normalise(nn.Conv2d(count, width, 4, 2, padding=1)), nn.LeakyReLU(0.2)]
            count, side = width, side // 2
        self.body = nn.Sequential(*layers)
        self.verdict = Verdict(count, num_classes, normalise)

    def forward(self, maps: Tensor, labels: Tensor | None) -> Tensor:
        for layer in self.body:
            if isinstance(layer, nn.Conv2d) and maps.shape[-1] < 2:
                break
            maps = layer(maps)
        return self.verdict(maps, labels)


def _without_backbone(module: nn.Module, state: dict, prefix: str, *_) -> None:
    """Checkpoints of before held the frozen weights too."""
    for name in [name for name in state if name.startswith(f"{prefix}backbone.")]:
        del state[name]


class ProjectedDiscriminator(Growing):
    """images (N, 3, S, S), labels (N,) -> logits (N, 5), one from the pixels and one from each of four frozen feature maps.

    The features are EfficientNet-Lite0's, of strides 2 to 16 (Sauer et al. 2021). A head on the pixels sees what they miss: fine
    noise and exact colours.
    """

    def __init__(self, config: ModelConfig, pretrained: bool = True):
        super().__init__(config)
        normalise = spectral if config.spectral_norm else plain
        width, on_pixels = (*config.d_channels, config.d_channels[0] // 2)[:2]
        self.backbone = Lite0(pretrained)
        self.mixing = Mixing(Lite0.fine, width)
        sides = [config.seen // stride for stride in (2, 4, 8, 16)]
        self.heads = nn.ModuleList(Head(width, side, width, self.kinds, normalise) for side in sides)
        self.register_load_state_dict_pre_hook(_without_backbone)
        self.pixels = Head(3, config.seen, on_pixels, self.kinds, normalise)

    def look(self, images: Tensor) -> list[Tensor]:
        """The images and their frozen features, fine to coarse."""
        images = self.reached(images)
        return [images, *self.backbone.maps(images, (0, 1, 2, 3))]

    def judge(self, maps: list[Tensor], labels: Tensor | None = None) -> Tensor:
        kind = self.kind(labels, len(maps[0]), maps[0].device)
        logits = [head(item, kind) for head, item in zip(self.heads, self.mixing(maps[1:]), strict=True)]
        return torch.cat([self.pixels(maps[0], kind), *logits], dim=1)
