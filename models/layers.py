"""Layers of the improved networks. Feature maps are (N, C, H, W) float; styles (N, style_dim)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

GROUP = 4  # images that the discriminators compare with each other
GAIN = math.sqrt(2.0)  # of a leaky ReLU of slope 0.2, roughly: keeps the variance from layer to layer


def activate(maps: Tensor) -> Tensor:
    """Leaky ReLU that keeps the variance."""
    return F.leaky_relu(maps, 0.2) * GAIN


def crop(maps: Tensor, border: int) -> Tensor:
    """Leave out ``border`` positions on each side."""
    return maps[..., border : maps.shape[-2] - border, border : maps.shape[-1] - border]


def reduced(images: Tensor, side: int) -> Tensor:
    """(N, C, S, S) averaged down to ``side``, of which S is a multiple; as they are where they are no larger."""
    factor = images.shape[-1] // side
    return F.avg_pool2d(images, factor) if factor > 1 else images


def cut_out(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """(N, C, side, side): of each image the square at its own corner. corners: (N, 2) whole numbers, down and across."""
    if images.device.type != "cpu":
        return gathered(images, corners, side)
    places = corners.long().tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, places, strict=True)])


def gathered(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """The same as ``cut_out`` by indices, slower on a CPU: an accelerator need not wait until the host knows the corners."""
    count, channels, _, width = images.shape
    places = corners.to(images.device, torch.long, non_blocking=True)[:, :, None] + torch.arange(side, device=images.device)
    rows = places[:, 0, None, :, None].expand(count, channels, side, width)
    columns = places[:, 1, None, None, :].expand(count, channels, side, side)
    return images.gather(2, rows).gather(3, columns)


def double(maps: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H - 2, 2W - 2): bilinear, without the outermost positions, which would have to be made up."""
    if maps.device.type != "cpu":
        return crop(F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False), 1)
    # A CPU takes two thirds of an interpolation's time, forwards and backwards, for the same as a transposed convolution.
    row = maps.new_tensor([0.25, 0.75, 0.75, 0.25])
    kernel = torch.outer(row, row).expand(maps.shape[1], 1, 4, 4)
    return F.conv_transpose2d(maps, kernel, stride=2, padding=2, groups=len(kernel))


class EqualLinear(nn.Linear):
    """Linear layer whose weights are scaled when used, so that all layers learn at one speed (Karras et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0):
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight)
        nn.init.constant_(self.bias, bias)

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, self.weight / math.sqrt(self.in_features), self.bias)


class StyledConv(nn.Module):
    """Convolution without padding whose input channels are scaled by a style.

    norm "demodulation": the expected variance of the result is divided out (StyleGAN2, Karras et al. 2020). Scaling the maps
    before and after one shared convolution equals a convolution of its own for each image and needs no grouped one, slow on CPUs.
    norm "instance": conditional instance norm instead (Huang and Belongie, AdaIN, 2017). norm "none": for the layer of colours.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, style_dim: int, norm: str):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.style = EqualLinear(style_dim, inputs, bias=1.0)
        self.norm = norm
        self.shift = EqualLinear(style_dim, 2 * outputs) if norm == "instance" else None

    def forward(self, maps: Tensor, style: Tensor, scale: Tensor, gain: float = 1.0) -> Tensor:
        """scale: what ``scales`` makes of the style. gain: factor of the maps that costs no pass over them here."""
        weight = self.weight / math.sqrt(self.weight[0].numel())
        result = F.conv2d(maps * (gain * scale)[:, :, None, None], weight)
        if self.norm == "demodulation":
            power = scale.square() @ weight.square().sum(dim=(2, 3)).T
            return torch.addcmul(self.bias[:, None, None], result, torch.rsqrt(power + 1e-8)[:, :, None, None])
        if self.shift is not None:
            gain, offset = self.shift(style)[:, :, None, None].chunk(2, dim=1)
            return F.instance_norm(result) * (1.0 + gain) + offset
        return result + self.bias[:, None, None]


def scales(convolutions: list[StyledConv], style: Tensor) -> list[Tensor]:
    """What a style gives each convolution, (N, its inputs), in one product: GPUs take many small ones one by one slowly."""
    layers = [convolution.style for convolution in convolutions]
    weight = torch.cat([layer.weight for layer in layers]) / math.sqrt(style.shape[1])
    values = F.linear(style, weight, torch.cat([layer.bias for layer in layers]))
    return list(values.split([layer.out_features for layer in layers], dim=1))


class SelfAttention(nn.Module):
    """Self-attention over positions (Zhang et al., SAGAN, 2019), one head, added with a weight that starts at 0.

    It has no notion of place: what it adds to a position follows from what all positions hold.
    """

    def __init__(self, channels: int, normalise=lambda layer: layer):
        super().__init__()
        self.inner = max(8, channels // 4)
        self.ask = normalise(nn.Conv2d(channels, 2 * self.inner, 1, bias=False))
        self.give = normalise(nn.Conv2d(channels, self.inner, 1, bias=False))
        self.out = normalise(nn.Conv2d(self.inner, channels, 1, bias=False))
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor) -> Tensor:
        query, key = self.ask(maps).flatten(2).transpose(1, 2).chunk(2, dim=2)
        value = self.give(maps).flatten(2).transpose(1, 2)
        # Written out, since the fused form has no second derivative, which gradient penalties take.
        heads = torch.softmax((query / math.sqrt(self.inner)) @ key.transpose(1, 2), dim=2) @ value
        heads = heads.transpose(1, 2).reshape(len(maps), self.inner, *maps.shape[2:])
        return maps + self.weight * self.out(heads)


def minibatch_deviation(maps: Tensor) -> Tensor:
    """Append one map that holds how much the images of a group of GROUP differ (Karras et al. 2018): (N, C + 1, H, W).

    A collapsed generator shows there. Groups stride through the batch; a batch that GROUP does not divide is one group.
    """
    count = len(maps)
    size = GROUP if count % GROUP == 0 else count
    spread = maps.reshape(size, count // size, *maps.shape[1:]).var(dim=0, unbiased=False).add(1e-8).sqrt()
    column = spread.mean(dim=(1, 2, 3)).repeat(size)
    return torch.cat([maps, column[:, None, None, None].expand(-1, 1, *maps.shape[2:])], dim=1)


def side_by_side(a: Tensor, b: Tensor) -> Tensor:
    """Two batches (N, ...), N a multiple of GROUP -> (2N, ...); ``minibatch_deviation`` then compares each with itself."""
    return torch.cat([a.unflatten(0, (GROUP, -1)), b.unflatten(0, (GROUP, -1))], dim=1).flatten(0, 1)


def apart(both: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``side_by_side``."""
    a, b = both.unflatten(0, (GROUP, 2, -1)).unbind(1)
    return a.flatten(0, 1), b.flatten(0, 1)


def plain(layer: nn.Module) -> nn.Module:
    """The layer as it is."""
    return layer


class SpectralNorm(nn.Module):
    """Parametrisation of a weight (outputs, ...): divided by its largest singular value (Miyato et al. 2018).

    The value is followed by power iteration, which ``advance_spectral_norms`` takes a step of: between two calls the norm stays as
    it is, so that a step's weights do not depend on how often they are used. The division is done here, or for all layers of a
    network at once inside ``spectral_weights``.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("_u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("_v", F.normalize(torch.randn(matrix.shape[1]), dim=0))
        self.held: Tensor | None = None
        for _ in range(15):
            _iterate([self], matrix[None])

    def forward(self, weight: Tensor) -> Tensor:
        return _divided([self], weight[None])[0] if self.held is None else self.held


def _iterate(norms: list[SpectralNorm], matrices: Tensor) -> None:
    """A step of the power iteration for matrices (K, m, n) of one shape. GPUs take many small products one by one slowly."""
    vectors = torch.stack([norm._v for norm in norms])[:, :, None]
    left = F.normalize(matrices @ vectors, dim=1, eps=1e-12)
    right = F.normalize(matrices.transpose(1, 2) @ left, dim=1, eps=1e-12)
    torch._foreach_copy_([norm._u for norm in norms], list(left[:, :, 0]))
    torch._foreach_copy_([norm._v for norm in norms], list(right[:, :, 0]))


def _divided(norms: list[SpectralNorm], weights: Tensor) -> Tensor:
    """Weights (K, outputs, ...) of one shape -> divided by their norms, with the gradient through these."""
    left, right = torch.stack([norm._u for norm in norms]), torch.stack([norm._v for norm in norms])
    value = (left[:, None] @ weights.flatten(2) @ right[:, :, None]).reshape(-1, *[1] * (weights.ndim - 1))
    return weights / value


def _alike(network: nn.Module) -> list[tuple[list[SpectralNorm], list[Tensor]]]:
    """The spectral norms of a network and their weights, grouped by shape."""
    groups: dict[tuple, tuple[list, list]] = {}
    for layer in network.modules():
        if is_parametrized(layer, "weight"):
            weight = layer.parametrizations.weight.original
            norms, weights = groups.setdefault((weight.shape, weight.requires_grad), ([], []))
            norms.append(layer.parametrizations.weight[0])
            weights.append(weight)
    return list(groups.values())


def spectral(layer: nn.Module) -> nn.Module:
    """The layer with its largest singular value held at 1."""
    register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


@torch.no_grad()
def advance_spectral_norms(network: nn.Module) -> None:
    """One step of the power iteration behind each spectral norm."""
    for norms, weights in _alike(network):
        _iterate(norms, torch.stack([weight.flatten(1) for weight in weights]))


@contextmanager
def spectral_weights(network: nn.Module) -> Iterator[None]:
    """Inside, weights with spectral norms are what they are now, calculated once for all layers and all their uses."""
    groups = _alike(network)
    for norms, weights in groups:
        for norm, weight in zip(norms, _divided(norms, torch.stack(weights)), strict=True):
            norm.held = weight
    try:
        yield
    finally:
        for norms, _ in groups:
            for norm in norms:
                norm.held = None


class _Total(torch.autograd.Function):
    """Sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Total.apply(gradient.contiguous())


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batch of all processes of a training (PyTorch's own for that needs CUDA).

    shared: False in networks that one process runs by itself.
    """

    shared = True

    def forward(self, maps: Tensor) -> Tensor:
        if not (self.shared and self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(maps)
        count = maps.numel() // maps.shape[1] * dist.get_world_size()
        mean = _Total.apply(maps.sum(dim=(0, 2, 3))) / count
        centred = maps - mean[:, None, None]
        variance = _Total.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


def run_alone(network: nn.Module) -> nn.Module:
    """The network, from now on without a look at other processes."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.shared = False
    return network
