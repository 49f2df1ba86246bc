"""The improved generator: tissue from a field of noise, without a place that it could know.

Tissue has no preferred position, but a generator with padding or a learned start has: it paints the same border or corner into
every image. This one starts from a field of independent noise (Jetchev et al., "Texture synthesis with spatial GANs", 2016), pads
nowhere, and paints a larger canvas than it shows, so that each position of the image is made alike by construction. On the way
the canvas is bent, so that the lattice of the noise does not show. A second, global part of the latent gives the style (Karras
et al., StyleGAN2, 2020): stain, density, and the label. Noise behind each convolution (Karras et al., StyleGAN, 2019) gives the
detail its chance, so that the field is left free to vary the layout; it is read from one sheet, at places that follow from z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import BASE, FIELD_CHANNELS, FIELD_SIDE, MARGIN, NOISE_DIM, PLACE_DIM, STYLE_DIM, ModelConfig, View
from models.layers import GAIN, EqualLinear, SelfAttention, StyledConv, activate, crop, cut_out, double, reduced, scales

SLACK = 6  # pixels of the last canvas beyond the image: where in them the image lies follows from z
BEND = 0.7  # standard deviation in positions of the second level, two to a position of the noise field
SHEET = 1024  # positions a side of the noise that all images read
STYLES = 2048  # that the mean style of a label is taken over
COLOR_GAIN = 0.8  # start with pale colours; each level adds its share


def bend(maps: Tensor, noise: Tensor) -> Tensor:
    """Maps of the second level (N, C, H, W), read at randomly, smoothly moved places. noise: (N, 2, FIELD_SIDE, FIELD_SIDE).

    The field that the generator starts from is a lattice, and the nuclei painted from it would stand in rows and columns. Moved by
    about a third of a position of the lattice, more or less, they do not. Moving further, or less smoothly, tears them.
    """
    # Twice a mean over 3x3: a triangle of weights, whose standard deviation 19/81 is made 1 again.
    smooth = F.avg_pool2d(F.avg_pool2d(noise, 3, 1), 3, 1) * (81 / 19)
    moves = crop(F.interpolate(smooth, scale_factor=2.0, mode="bilinear", align_corners=False), 3) * (BEND * 2.0 / maps.shape[-1])
    identity = torch.eye(2, 3, dtype=noise.dtype, device=maps.device).expand(len(maps), 2, 3)
    with torch.autocast(maps.device.type, enabled=False):  # bfloat16 counts places to half a pixel of 256
        places = F.affine_grid(identity, list(maps.shape), align_corners=False) + moves.permute(0, 2, 3, 1)
    return F.grid_sample(maps, places, mode="bilinear", padding_mode="reflection", align_corners=False)


def drawn(normal: Tensor, count: int) -> Tensor:
    """Standard normal numbers -> whole ones from 0 to ``count`` - 1, each as likely."""
    return (torch.special.ndtr(normal) * count).floor().clamp(max=count - 1)


class Level(nn.Module):
    """One resolution: maps (N, C, r + 10, r + 10) -> (N, C', r + 6, r + 6), a residual pair of 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, norm: str, attention: bool, noise: bool):
        super().__init__()
        self.enter = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.first = StyledConv(outputs, outputs, 3, style_dim, norm)
        self.second = StyledConv(outputs, outputs, 3, style_dim, norm)
        self.attention = SelfAttention(outputs) if attention else nn.Identity()
        self.color = StyledConv(outputs, 3, 1, style_dim, "none")
        self.noise = nn.Parameter(torch.zeros(2, outputs, 1, 1)) if noise else None  # how much of it each map takes

    def forward(self, maps: Tensor, style: Tensor, given: Sequence[Tensor], noise: Sequence[Tensor] = ()) -> Tensor:
        """given: scales of both convolutions. noise: of each layer, (N, 1, r + 8, r + 8) and (N, 1, r + 6, r + 6), if any."""
        # Passes over large maps are what a CPU spends its time on: the gain of the first activation goes into the next layer's
        # styles, and that of the second is undone by the mean of both ways: (maps + GAIN * new) * sqrt(1/2).
        new = F.leaky_relu(self._noisy(self.first(maps, style, given[0]), noise, 0), 0.2, inplace=True)
        new = F.leaky_relu(self._noisy(self.second(new, style, given[1], GAIN), noise, 1), 0.2, inplace=True)
        return self.attention(torch.add(new, crop(maps, 2), alpha=math.sqrt(0.5)))

    def _noisy(self, maps: Tensor, noise: Sequence[Tensor], layer: int) -> Tensor:
        return torch.addcmul(maps, self.noise[layer], noise[layer]) if noise else maps


class ImprovedGenerator(nn.Module):
    """z (N, latent_dim), labels (N,) -> images (N, 3, S, S), about [-1, 1]; squashing them would starve white glass of gradient.

    growth: log2 of the resolution painted, fractions while the next one fades in: 5.5 is 32 pixels with half of what the 64-pixel
    level adds. Images smaller than the output size S come smoothly enlarged (repeated pixels would be a grid), larger ones averaged
    down. It travels in the state_dict.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.growth = math.log2(config.image_size)
        self.embedding = nn.Embedding(config.num_classes, STYLE_DIM) if config.num_classes else None
        start = STYLE_DIM * (2 if config.num_classes else 1)
        self.mapping = nn.ModuleList([EqualLinear(start, 2 * STYLE_DIM), EqualLinear(2 * STYLE_DIM, STYLE_DIM)])
        widths = config.g_channels
        self.start = StyledConv(FIELD_CHANNELS, widths[0], 1, STYLE_DIM, config.norm)
        self.levels = nn.ModuleList(
            Level(before, after, STYLE_DIM, config.norm, BASE * 2**k in config.attention, config.layer_noise)
            for k, (before, after) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
        )

        self.keep = 1.0
        self.register_buffer("shift", None, persistent=False)  # (labels or 1, STYLE_DIM): see ``steer``
        if config.layer_noise:
            sheet = torch.randn(1, 1, SHEET, SHEET, generator=torch.Generator().manual_seed(0))
            self.register_buffer("sheet", sheet, persistent=False)

    def get_extra_state(self) -> float:
        return self.growth

    def set_extra_state(self, state: float) -> None:
        self.growth = float(state)

    def forward(self, z: Tensor, labels: Tensor | None = None, view: View | None = None) -> Tensor:
        """view: what is looked at in training, at its own size (N, 3, view.side, view.side); None for the whole image."""
        if view is not None and view.averaged:
            return reduced(self(z, labels, View(view.growth + 1.0)), view.resolution)
        shown = view or View(self.growth)
        style = self._style(z[:, :STYLE_DIM], labels)
        field, places = z[:, STYLE_DIM : -self.config.place_dim], z[:, -self.config.place_dim : -PLACE_DIM]
        field = field.reshape(len(z), -1, FIELD_SIDE, FIELD_SIDE)
        start = field[:, :FIELD_CHANNELS].contiguous(memory_format=torch.channels_last)
        levels = list(self.levels)[: int(math.log2(shown.resolution // BASE)) + 1]
        convolutions = [self.start] + [layer for level in levels for layer in (level.first, level.second, level.color)]
        first, *given = scales(convolutions, style)
        maps = activate(self.start(start, style, first))
        colors = None
        for number, level in enumerate(levels):
            if number:
                # The narrowing 1x1 convolution commutes with the doubling, and costs a quarter before it.
                maps = double(level.enter(maps))
                colors = crop(double(colors), 2)
            own = given[3 * number : 3 * number + 3]
            maps = level(maps, style, own, self._noise(places, number, maps.shape[-1]) if self.config.layer_noise else ())
            if number == 1 and self.config.bent:
                maps, colors = bend(maps, field[:, FIELD_CHANNELS:]), bend(colors, field[:, FIELD_CHANNELS:])
            new = level.color(maps, style, own[2])
            fade = shown.fade if BASE * 2**number == shown.resolution else 1.0
            colors = new if colors is None else colors + fade * new
            if number == 1 and shown.windowed:
                # From here on there are convolutions alone: the window is painted as if the rest were there.
                maps, colors = crop(maps, BASE // 2), crop(colors, BASE // 2)
        images = self._shown(colors * (COLOR_GAIN / math.sqrt(len(self.levels))), z[:, -PLACE_DIM:], shown.resolution)
        return images if view is not None else self._at_output_size(images)

    def _noise(self, places: Tensor, number: int, side: int) -> list[Tensor]:
        """What a level's two layers add to maps that enter it with ``side`` positions; a window reads its part of the whole."""
        whole = BASE * 2**number + 2 * MARGIN
        corners = drawn(places[:, NOISE_DIM * number : NOISE_DIM * (number + 1)], SHEET - whole) + (whole - side) // 2
        sheet = self.sheet.expand(len(places), -1, -1, -1)
        return [cut_out(sheet, corners[:, 2 * layer : 2 * layer + 2], side - 2 * (layer + 1)) for layer in (0, 1)]

    def _style(self, z: Tensor, labels: Tensor | None) -> Tensor:
        style = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        if self.embedding is not None:
            style = torch.cat([style, self.embedding(labels)], dim=1)
        for layer in self.mapping:
            style = activate(layer(style))
        if self.shift is None:
            return style
        return self.keep * style + (self.shift if labels is None else self.shift[labels])

    @torch.no_grad()
    def steer(self, told_apart: Sequence[int], guidance: float = 0.0, truncation: float = 1.0) -> None:
        """How images are painted from now on: guidance 0 and truncation 1 as in training.

        guidance: the styles of the labels ``told_apart`` move away from what these have in common, by that many times the way from
        the mean style of all of them to the label's own, as classifier-free guidance moves the scores of a diffusion model (Ho and
        Salimans, 2022). truncation: styles keep that share of their way from the label's mean (Karras et al., StyleGAN, 2019).
        """
        self.keep, self.shift = 1.0, None
        if guidance or truncation < 1:
            means = self._mean_styles()
            shift, told_apart = (1 - truncation) * means, list(told_apart)
            if guidance:
                shift[told_apart] += guidance * (means[told_apart] - means[told_apart].mean(dim=0))
            self.keep, self.shift = truncation, shift

    def _mean_styles(self) -> Tensor:
        """Mean style of each label, or of all images: (labels or 1, STYLE_DIM)."""
        weight = self.mapping[0].weight
        z = torch.randn(STYLES, STYLE_DIM, generator=torch.Generator().manual_seed(0)).to(weight)
        each = [torch.full((STYLES,), label, device=weight.device) for label in range(self.config.num_classes)]
        return torch.stack([self._style(z, labels).mean(dim=0) for labels in each or [None]])

    def _shown(self, canvas: Tensor, place: Tensor, resolution: int) -> Tensor:
        """The image out of its canvas, at an offset that z decides: doublings leave a period of pixels, a random phase hides it."""
        side = canvas.shape[-1] - SLACK
        moved = drawn(place, SLACK + 1) - SLACK // 2
        share = resolution / self.config.image_size
        return cut_out(canvas, SLACK // 2 + (moved * share).round(), side)

    def _at_output_size(self, images: Tensor) -> Tensor:
        size = self.config.output_size
        if images.shape[-1] >= size:
            return reduced(images, size)
        return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
