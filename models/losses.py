"""Objectives: small pure functions of logits (N,) -> scalar loss. Logits above 0 say "real"."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bce_discriminator_loss(real: Tensor, fake: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy of Goodfellow et al. (2014), with one-sided label smoothing (Salimans et al. 2016).

    ``label_smoothing`` s in [0, 0.5): real images get the target 1 - s; fakes keep 0, since smoothing them rewards collapse.
    """
    real_loss = F.binary_cross_entropy_with_logits(real, real.new_full(real.shape, 1.0 - label_smoothing))
    return real_loss + F.softplus(fake).mean()


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """-log D(G(z)), the non-saturating form of Goodfellow et al. (2014)."""
    return F.softplus(-fake).mean()
