"""Networks and objectives, in torch only. ``build`` is the one way to make networks; it needs nothing but a ModelConfig."""

from torch import nn

from models.config import ModelConfig
from models.dcgan import DCGANDiscriminator, DCGANGenerator


def build(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """Return (generator, discriminator), freshly initialised from torch's global random state.

    generator(z (N, latent_dim), labels (N,) int64 or None) -> images (N, 3, S, S) in [-1, 1].
    discriminator(images, labels) -> logits (N,), above 0 for "real".
    """
    return DCGANGenerator(config), DCGANDiscriminator(config)
