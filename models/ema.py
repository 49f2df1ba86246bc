"""The generator whose images people see: an exponential moving average of the weights, with batch-norm statistics of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.layers import run_alone

RAMP_UP = 0.05


def ema_decay(images_seen: int, batch_size: int, half_life: float) -> float:
    """Decay for one step of ``batch_size`` images.

    ``half_life``: images after which a weight counts half. Early on the half-life is at most 5 % of the images seen, so that the
    average does not carry the random start along (the ramp-up of Karras et al., StyleGAN2-ADA, 2020).
    """
    half_life = min(half_life, max(images_seen, 1) * RAMP_UP)
    return 0.5 ** (batch_size / max(half_life, 1e-8))


def make_ema(generator: nn.Module) -> nn.Module:
    """A frozen copy of ``generator`` in evaluation mode."""
    return run_alone(copy.deepcopy(generator)).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, generator: nn.Module, decay: float) -> None:
    """Move the average one step towards ``generator``. Buffers are left alone: see ``calibrate_batch_norm``."""
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in generator.parameters()], 1.0 - decay)


@torch.no_grad()
def calibrate_batch_norm(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Give a network the batch-norm statistics of its own weights: the mean over ``batches`` of (z, labels).

    Averaged weights with the trained network's running statistics fit neither; a few forward passes mend that. Leaves the network
    in evaluation mode. Does nothing for a network without batch norm.
    """
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average instead of an exponential one
        norm.train()
    for z, labels in batches:
        network(z, labels)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
