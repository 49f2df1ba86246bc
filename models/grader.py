"""A small judge of labels for the generator: does an image show its label as clearly as real ones do?

A discriminator with the label as an input learns it slowly from few patches, since a wrong label is a small fault beside an unreal
image. Frozen features tell the labels of real patches apart by a linear layer alone. An auxiliary classifier (Odena et al., AC-GAN,
2017) that is obeyed without end paints caricatures of a class, without variety; so this one is obeyed only until generated images
show their label as clearly as real ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEMORY = 100  # steps over which means of features and of the loss are taken
DECAY = 0.03  # weight of the squared weights: without it the patches' slides are learned by heart


class Grader(nn.Module):
    """Feature statistics, a list of (N, 2C) (``losses.statistics``), and labels (N,) -> cross-entropies, multinomial logistic
    regression on standardised features.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(width, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("square", torch.ones(width))
        self.register_buffer("clear", torch.zeros(()))  # cross-entropy of real images before they were learned from

    def _loss(self, features: list[Tensor], labels: Tensor) -> Tensor:
        deviation = (self.square - self.mean.square()).clamp(min=1e-6).sqrt()
        return F.cross_entropy(self.linear((torch.cat(features, dim=1) - self.mean) / deviation), labels)

    def learn(self, real: list[Tensor], labels: Tensor) -> Tensor:
        """The loss to learn from on real images; their statistics are taken on the way."""
        with torch.no_grad():
            values = torch.cat(real, dim=1)
            self.steps += 1
            pace = torch.clamp(1.0 / self.steps, min=1.0 / MEMORY)
            self.mean.lerp_(values.mean(dim=0), pace)
            self.square.lerp_(values.square().mean(dim=0), pace)
        loss = self._loss(real, labels)
        with torch.no_grad():
            self.clear.lerp_(loss.detach(), pace)
        return loss + DECAY * self.linear.weight.square().sum()

    def unclear(self, fake: list[Tensor], labels: Tensor) -> Tensor:
        """How much less clearly than real ones generated images show their labels, a cross-entropy in nats of at least 0."""
        return F.relu(self._loss(fake, labels) - self.clear)
