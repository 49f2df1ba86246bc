"""What a network is made of. Stored in every checkpoint, so that networks are rebuilt without any flag."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from common.errors import UserError

MODELS = ("dcgan", "improved")
DISCRIMINATORS = ("projected", "residual")
NORMS = ("demodulation", "instance")
IMAGE_SIZES = (64, 128, 256)


# The improved generator's start: see models.improved.
BASE = 8  # positions a side of the noise field that end up in the image
MARGIN = 5  # positions on each side at the start of each level: two convolutions and a doubling lead back to it
STYLE_DIM = 64
FIELD_CHANNELS = 8
PLACE_DIM = 2  # at the end of z: where on its canvas the image lies
NOISE_DIM = 4  # before it, for each level: where on the sheet of noise its two layers read
BEND_CHANNELS = 2  # of the field: where what it paints is moved to, across and down
FIELD_SIDE = BASE + 2 * MARGIN

_TUPLES = ("g_channels", "d_channels", "attention")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a generator and discriminator pair.

    image_size: side of the square image in pixels, a power of two. latent_dim: length of z. num_classes: 0 for an unconditional
    model. g_channels: feature maps of the generator at 4x4, 8x8, ... up to half the image size. d_channels: feature maps of the
    discriminator from half the image size down to 4x4.
    The rest is the improved model's: g_channels count from 8x8 up to the image size; discriminator, norm: see the names above;
    d_channels: of the residual one from the image size down, of the projected one the width of its heads on features and, where it
    is not half of that, of its head on pixels; attention: resolutions with self-attention; spectral_norm: in the discriminator;
    grow_from: resolution that progressive growing starts at; bent: whether the generator bends its canvas (in older checkpoints it
    does not); window: side in pixels of what the discriminator sees at once, 0 for the whole image: see ``View``; layer_noise:
    whether the generator's layers add noise; reduced_to: side in pixels that the images which come out are averaged down to, where
    that is less than the image_size that they are painted and learned at, else 0.
    """

    model: str
    image_size: int
    latent_dim: int
    num_classes: int
    g_channels: tuple[int, ...]
    d_channels: tuple[int, ...]
    discriminator: str = ""
    norm: str = ""
    attention: tuple[int, ...] = ()
    spectral_norm: bool = False
    grow_from: int = 0
    bent: bool = False
    window: int = 0
    layer_noise: bool = False
    reduced_to: int = 0

    @property
    def output_size(self) -> int:
        """Side in pixels of the images that come out."""
        return self.reduced_to or self.image_size

    @property
    def seen(self) -> int:
        """Side in pixels of the largest image that the discriminator sees at once."""
        return self.window or self.image_size

    @property
    def place_dim(self) -> int:
        """How many of z's last numbers are places: of the image on its canvas, of noise on its sheet; 0 for the baseline."""
        noise = NOISE_DIM * len(self.g_channels) if self.layer_noise else 0
        return PLACE_DIM + noise if self.model == "improved" else 0

    def to_dict(self) -> dict:
        """Plain types only, for the checkpoint."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _TUPLES}

    @staticmethod
    def from_dict(values: dict) -> ModelConfig:
        """Inverse of ``to_dict``. Raises UserError for a model or a field that this version does not know."""
        try:
            config = ModelConfig(**values | {name: tuple(values[name]) for name in _TUPLES if name in values})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the model configuration does not fit this version ({error}); use the version it was trained with"
            ) from error
        if config.model not in MODELS:
            raise UserError(f"model {config.model!r} is unknown to this version; use the version it was trained with")
        return config


@dataclass(frozen=True)
class View:
    """What the networks look at in one step of training.

    growth: log2 of the resolution of the whole image, fractions while the next one fades in. windowed: only a window of half its
    side, a quarter of the image at full resolution. Tissue looks alike everywhere and a generator without a place can paint any
    part of its canvas by itself, so that windows for the detail and whole images of half the resolution for the layout teach
    the same as whole images do, for a third of the arithmetic. averaged: the whole image, painted at twice its resolution and
    averaged down. share: the fade as a tensor on the networks' device, where it must be one; None: as growth says.
    """

    growth: float
    windowed: bool = False
    averaged: bool = False
    share: Tensor | None = None

    @property
    def resolution(self) -> int:
        """Side in pixels of the whole image."""
        return 2 ** math.ceil(self.growth)

    @property
    def fade(self) -> float | Tensor:
        """How far that resolution has faded in, above 0 to 1."""
        return self.growth - math.ceil(self.growth) + 1.0 if self.share is None else self.share

    @property
    def side(self) -> int:
        """Side in pixels of what is looked at."""
        return self.resolution // (2 if self.windowed else 1)


def _check_size(image_size: int) -> None:
    if image_size not in IMAGE_SIZES:
        raise UserError(f"image_size {image_size} is not one of {', '.join(map(str, IMAGE_SIZES))}; choose one of these")


def dcgan_config(image_size: int, num_classes: int) -> ModelConfig:
    """The DCGAN of Radford et al. (2016) for ``image_size`` 64, 128 or 256, at widths that a laptop trains.

    32 feature maps at half the image size, twice as many at each halving, 512 at most: half the width of the common 64-pixel
    example and its natural extension beyond. 0.05, 0.3 and 1.3 GFLOP per generated image.
    """
    _check_size(image_size)
    sizes = [image_size // 2**k for k in range(1, image_size.bit_length() - 2)]
    channels = tuple(min(512, 32 * (image_size // 2 // size)) for size in sizes)
    return ModelConfig("dcgan", image_size, 100, num_classes, channels[::-1], channels)


# Feature maps of the improved generator at 8x8, 16x16, ..., 256x256, and the width of the discriminator, by preset.
WIDTHS = {
    "cpu": ((64, 64, 48, 24, 16, 8), 32),
    "gpu": ((256, 256, 192, 96, 48, 24), 64),
    "large": ((512, 512, 384, 192, 96, 48), 128),
}


def painted_size(model: str, image_size: int) -> int:
    """Side in pixels at which ``model`` paints images of ``image_size``, and of the patches that teach it.

    The improved model paints and learns at 128 at least. Painted at 64, the last octave was half of what was wrong with its images;
    averaged down from 128 it comes right by itself (docs/experiments.md).
    """
    return max(image_size, 128) if model == "improved" else image_size


def improved_config(
    image_size: int,
    num_classes: int,
    preset: str = "cpu",
    discriminator: str = "projected",
    norm: str = "demodulation",
    attention: bool = True,
    spectral_norm: bool = True,
    grow_from: int | None = None,
    window: int | None = None,
    layer_noise: bool | None = None,
    reduced_to: int = 0,
) -> ModelConfig:
    """The improved model at the widths of ``preset``, painting at ``image_size``, averaged down to ``reduced_to`` if that is given.

    grow_from None: progressive growing starts at 64 pixels, and what is averaged down does not grow, since its windows cost no more
    than small images. window None: the discriminator sees 128 pixels at once, or as many as images are averaged down to; all of
    them where maps are normalised by their own statistics, which a window has others of than the image. layer_noise None: above 64
    pixels, see docs/experiments.md. Raises UserError for a window of less than half the image, or of an image so normalised.
    """
    _check_size(image_size)
    window = min(image_size, window or (image_size if norm == "instance" else reduced_to or 128))
    if norm == "instance" and window < image_size:
        raise UserError(f"--norm instance takes its statistics from whole images; leave --window {window} out")
    if 2 * window < image_size:
        raise UserError(f"window {window} is less than half of image_size {image_size}; choose {image_size // 2} or {image_size}")
    widths, width = WIDTHS[preset]
    levels = image_size.bit_length() - 3
    pyramid = tuple(min(8 * width, width * 2**k // 2) for k in range(window.bit_length() - 2))
    layer_noise = image_size > 64 if layer_noise is None else layer_noise
    config = ModelConfig(
        "improved",
        image_size,
        STYLE_DIM + (FIELD_CHANNELS + BEND_CHANNELS) * FIELD_SIDE**2,
        num_classes,
        g_channels=widths[:levels],
        d_channels=(width, width if layer_noise else width // 2) if discriminator == "projected" else pyramid,
        discriminator=discriminator,
        norm=norm,
        attention=(16,) if attention else (),
        spectral_norm=spectral_norm,
        grow_from=min(image_size, grow_from or (image_size if reduced_to else 64)),
        bent=True,
        window=window if window < image_size else 0,
        layer_noise=layer_noise,
        reduced_to=reduced_to,
    )
    return replace(config, latent_dim=config.latent_dim + config.place_dim)  # style, field, places
