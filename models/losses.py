"""Objectives: small pure functions of logits -> scalar loss. Logits above 0 say "real"; any shape, the same for real and fake."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OBJECTIVES = ("non_saturating", "hinge", "wgan", "relativistic")
RELATIVE = ("wgan", "relativistic")  # only differences of logits count, so that 0 says nothing


def discriminator_loss(objective: str, real: Tensor, fake: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """What the discriminator minimises.

    non_saturating: binary cross-entropy (Goodfellow et al. 2014) with one-sided smoothing, see ``bce_discriminator_loss``. hinge:
    Lim and Ye, "Geometric GAN", 2017. wgan: Arjovsky et al. 2017. relativistic: pairs of real and fake (Jolicoeur-Martineau 2019,
    as in R3GAN, Huang et al. 2024).
    """
    if objective == "hinge":
        return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()
    if objective == "wgan":
        return fake.mean() - real.mean()
    if objective == "relativistic":
        return F.softplus(fake - real).mean()
    return bce_discriminator_loss(real, fake, label_smoothing)


def judged_rightly(objective: str, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of real and of generated images on their side of 0; for RELATIVE objectives share of pairs in the right order, twice.

    No border in place of 0 would do: each of a discriminator's outputs, and each label, drifts to a level of its own.
    """
    if objective in RELATIVE:
        pairs = (real > fake).float().mean()
        return pairs, pairs
    return (real > 0.0).float().mean(), (fake < 0.0).float().mean()


def generator_loss(objective: str, fake: Tensor, real: Tensor) -> Tensor:
    """What the generator minimises; ``real`` logits matter to the relativistic pairing alone."""
    if objective in ("hinge", "wgan"):
        return -fake.mean()
    if objective == "relativistic":
        return F.softplus(real - fake).mean()
    return non_saturating_generator_loss(fake)


def bce_discriminator_loss(real: Tensor, fake: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy of Goodfellow et al. (2014), with one-sided label smoothing (Salimans et al. 2016).

    ``label_smoothing`` s in [0, 0.5): real images get the target 1 - s; fakes keep 0, since smoothing them rewards collapse.
    """
    real_loss = F.binary_cross_entropy_with_logits(real, real.new_full(real.shape, 1.0 - label_smoothing))
    return real_loss + F.softplus(fake).mean()


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """-log D(G(z)), the non-saturating form of Goodfellow et al. (2014)."""
    return F.softplus(-fake).mean()


def squared_gradient(judge: nn.Module, maps: list[Tensor], labels: Tensor | None) -> Tensor:
    """Squared norm of the gradient of D's logits with respect to what it looks at, mean over the batch (R1 on real, R2 on fake
    images: Mescheder et al. 2018). In float32. ``judge`` is a discriminator with a ``judge`` method, ``maps`` what it looked at."""
    return _gradient(judge, maps, labels).square().sum(dim=1).mean()


def gradient_penalty(judge: nn.Module, real: list[Tensor], fake: list[Tensor], labels: Tensor | None, share: Tensor) -> Tensor:
    """(norm of the gradient - 1)^2 on mixtures of real and fake (WGAN-GP, Gulrajani et al. 2017). In float32.

    share: of fake in each mixture, (N, 1, 1, 1), random in 0..1.
    """
    mixed = [torch.lerp(precise(a), precise(b), share) for a, b in zip(real, fake, strict=True)]
    return (_gradient(judge, mixed, labels).square().sum(dim=1).add(1e-12).sqrt() - 1.0).square().mean()


def _gradient(judge: nn.Module, maps: list[Tensor], labels: Tensor | None) -> Tensor:
    """(N, all elements) gradient of the sum of logits, itself differentiable."""
    maps = [precise(item.detach()).requires_grad_() for item in maps]
    with torch.autocast(maps[0].device.type, enabled=False):
        logits = judge.judge(maps, labels)
    gradients = torch.autograd.grad(logits.sum(), maps, create_graph=True)
    return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)


def energy_distance(real: list[Tensor], fake: list[Tensor], labels: Tensor | None) -> Tensor:
    """Feature matching: how far two batches are apart as distributions of feature statistics; its gradient teaches the generator.

    real, fake: ``statistics`` (N, 2C) of feature maps of one frozen network, fine to coarse. The energy distance (Szekely and Rizzo
    2013; for GANs Bellemare et al., "The Cramer distance", 2017) draws fakes towards the real ones and drives fakes apart, so that
    unlike a difference of means it rewards variety. With labels, images of different classes count as further apart, and each
    class is matched by itself. Without the term between real images, which no generator can change. Sum over the maps.
    """
    total = real[0].new_zeros(())
    for a, b in zip(real, fake, strict=True):
        scale = a.square().mean().sqrt().detach() + 1e-8
        a, b = a.detach() / scale, b / scale
        across = _distances(b, a, labels)
        within = _distances(b, b, labels)
        count = len(b)
        total = total + 2.0 * across.mean() - within.sum() / (count * max(1, count - 1))
    return total


def precise(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def statistics(maps: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 2C): mean and standard deviation of each channel over positions, in float32 at least."""
    maps = precise(maps)
    return torch.cat([maps.mean(dim=(2, 3)), maps.var(dim=(2, 3), unbiased=False).add(1e-6).sqrt()], dim=1)


def _distances(a: Tensor, b: Tensor, labels: Tensor | None) -> Tensor:
    squared = (a[:, None] - b[None]).square().mean(dim=2)
    if labels is not None:
        squared = squared + (labels[:, None] != labels[None]).to(squared.dtype)
    return squared.add(1e-6).sqrt()
