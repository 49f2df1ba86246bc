"""What a network is made of. Stored in every checkpoint, so that networks are rebuilt without any flag."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from common.errors import UserError

MODELS = ("dcgan",)
IMAGE_SIZES = (64, 128, 256)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a generator and discriminator pair.

    image_size: side of the square image in pixels, a power of two. latent_dim: length of z. num_classes: 0 for an unconditional
    model. g_channels: feature maps of the generator at 4x4, 8x8, ... up to half the image size. d_channels: feature maps of the
    discriminator from half the image size down to 4x4.
    """

    model: str
    image_size: int
    latent_dim: int
    num_classes: int
    g_channels: tuple[int, ...]
    d_channels: tuple[int, ...]

    def to_dict(self) -> dict:
        """Plain types only, for the checkpoint."""
        return asdict(self) | {"g_channels": list(self.g_channels), "d_channels": list(self.d_channels)}

    @staticmethod
    def from_dict(values: dict) -> ModelConfig:
        """Inverse of ``to_dict``. Raises UserError for a model or a field that this version does not know."""
        try:
            config = ModelConfig(
                **values | {"g_channels": tuple(values["g_channels"]), "d_channels": tuple(values["d_channels"])},
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the model configuration does not fit this version ({error}); use the version it was trained with"
            ) from error
        if config.model not in MODELS:
            raise UserError(f"model {config.model!r} is unknown to this version; use the version it was trained with")
        return config


def dcgan_config(image_size: int, num_classes: int) -> ModelConfig:
    """The DCGAN of Radford et al. (2016) for ``image_size`` 64, 128 or 256, at widths that a laptop trains.

    32 feature maps at half the image size, twice as many at each halving, 512 at most: half the width of the common 64-pixel
    example and its natural extension beyond. 0.05, 0.3 and 1.3 GFLOP per generated image.
    """
    if image_size not in IMAGE_SIZES:
        raise UserError(f"image_size {image_size} is not one of {', '.join(map(str, IMAGE_SIZES))}; choose one of these")
    sizes = [image_size // 2**k for k in range(1, image_size.bit_length() - 2)]
    channels = tuple(min(512, 32 * (image_size // 2 // size)) for size in sizes)
    return ModelConfig("dcgan", image_size, 100, num_classes, channels[::-1], channels)
