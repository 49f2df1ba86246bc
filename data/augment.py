"""What happens to a patch between the disk and the networks.

Flips and quarter turns are true symmetries of tissue and cost nothing, so they are on. Everything else changes what a patch looks
like, and a generator paints what it is shown: free rotation, elastic deformation, colour, stain and noise are off unless asked for.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from common.errors import UserError
from data.stain import jitter_stain

ELASTIC_LIMIT = 1 / 8  # of the image's side: four times as much, and a turn, still fit into what the mirrored margin holds
ELASTIC_SIGMA = 0.06  # smoothness of the elastic field, as a share of the image's side: bends glands, leaves nuclei round


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the augmentation of training patches; 0 switches a kind off.

    flips: probability of each of the two mirror images. quarter_turns: probability of a turn by 90, 180 or 270 degrees. rotation:
    largest free rotation in degrees, 0..45. color_jitter: relative change of brightness, contrast and saturation (hue moves by a
    tenth of it), 0..1. elastic: root mean square displacement in pixels. noise: standard deviation in grey levels of 255.
    stain_jitter: relative change of each stain in optical density, 0..1.
    """

    flips: float = 0.5
    quarter_turns: float = 0.75
    rotation: float = 0.0
    color_jitter: float = 0.0
    elastic: float = 0.0
    noise: float = 0.0
    stain_jitter: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain types only, for the checkpoint."""
        return asdict(self)

    def margin(self, size: int) -> int:
        """Pixels that an image of ``size`` is continued by on each side, mirrored, before it is rotated and bent: so many that the
        crop from its middle never shows a border. Enlarging it instead would teach tissue at another magnification."""
        angle = math.radians(self.rotation)
        turned = size * (math.cos(angle) + math.sin(angle) - 1.0) / 2
        return math.ceil(turned + 4 * self.elastic)  # four standard deviations of displacement

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """(3, S, S) uint8 -> (3, S, S) float in [-1, 1], decided by ``seed``."""
        image = self.moved(pixels, *self.symmetry(seed)).to(torch.float32).div_(255.0)
        if not self.symmetries_only:
            before = torch.get_rng_state()
            torch.default_generator.manual_seed(seed)
            image = self._colors(self._shapes(image) if self.rotation or self.elastic else image)
            torch.set_rng_state(before)
        return image.mul_(2.0).sub_(1.0)

    @property
    def symmetries_only(self) -> bool:
        """Whether patches are mirrored and turned and nothing else."""
        return not (self.rotation or self.elastic or self.color_jitter or self.stain_jitter or self.noise)

    def symmetry(self, seed: int) -> tuple[bool, bool, int]:
        """(mirrored across, mirrored down, quarter turns 0..3), decided by ``seed``."""
        chance = random.Random(seed)
        across, down = chance.random() < self.flips, chance.random() < self.flips
        return across, down, chance.randint(1, 3) if chance.random() < self.quarter_turns else 0

    @staticmethod
    def moved(pixels: Tensor, across: bool, down: bool, turns: int) -> Tensor:
        """(C, H, W) mirrored, then turned."""
        if across:
            pixels = pixels.flip(-1)
        if down:
            pixels = pixels.flip(-2)
        return pixels.rot90(turns, (-2, -1)) if turns else pixels

    def check(self, size: int) -> None:
        """Raise UserError where images of ``size`` pixels cannot be bent as much as asked."""
        if self.elastic > ELASTIC_LIMIT * size:
            most = f"{ELASTIC_LIMIT * size:g}"
            raise UserError(
                f"--elastic {self.elastic:g}: patches of {size} pixels are bent by {most} at most, or no tissue is left"
            )

    def _shapes(self, image: Tensor) -> Tensor:
        # torchvision takes two seconds to import, which a start without these kinds need not pay.
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        size, margin = image.shape[-1], self.margin(image.shape[-1])
        image = torch.nn.functional.pad(image[None], (margin,) * 4, mode="reflect")[0]
        if self.elastic:
            image = tv.elastic(image, self._displacements(image.shape[-1], ELASTIC_SIGMA * size))
        if self.rotation:
            angle = float(torch.empty(()).uniform_(-self.rotation, self.rotation))
            image = tv.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)
        return tv.center_crop(image, [size, size])

    def _displacements(self, side: int, sigma: float) -> Tensor:
        """(1, side, side, 2), smooth, in units of half a side: as torchvision's ElasticTransform, which blurs in two dimensions at
        once and takes twenty times as long for it."""
        from torchvision.transforms.v2 import functional as tv

        length = 2 * int(4 * sigma) + 1
        noise = 2.0 * torch.rand(2, 1, side, side) - 1.0
        smooth = tv.gaussian_blur(tv.gaussian_blur(noise, [length, 1], [sigma]), [1, length], [sigma])
        # Uniform noise blurred by sigma has standard deviation 1 / (sqrt(3) 2 sqrt(pi) sigma).
        pixels = self.elastic * math.sqrt(3.0) * 2.0 * math.sqrt(math.pi) * sigma * smooth
        return (2.0 / side * pixels).permute(1, 2, 3, 0)

    def _colors(self, image: Tensor) -> Tensor:
        if self.color_jitter:
            from torchvision.transforms import v2

            strength = self.color_jitter
            image = v2.ColorJitter(strength, strength, strength, min(0.1 * strength, 0.5))(image)
        if self.stain_jitter:
            image = jitter_stain(image, self.stain_jitter)
        if self.noise:
            image = image + torch.randn_like(image) * (self.noise / 255.0)
        return image.clamp(0.0, 1.0)
