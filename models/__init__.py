"""Networks and objectives, in torch only. ``build`` is the one way to make networks; it needs nothing but a ModelConfig."""

from torch import nn

from models.config import ModelConfig
from models.dcgan import DCGANDiscriminator, DCGANGenerator
from models.discriminators import ProjectedDiscriminator, ResidualDiscriminator
from models.improved import ImprovedGenerator


def build_generator(config: ModelConfig) -> nn.Module:
    """generator(z (N, latent_dim), labels (N,) int64 or None) -> images (N, 3, S, S), about [-1, 1], freshly initialised."""
    return DCGANGenerator(config) if config.model == "dcgan" else ImprovedGenerator(config)


def build(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """Return (generator, discriminator), freshly initialised from torch's global random state.

    discriminator.look(images) -> maps; discriminator.judge(maps, labels) -> logits (N,) or (N, K), above 0 for "real".
    """
    generator = build_generator(config)
    if config.model == "dcgan":
        return generator, DCGANDiscriminator(config)
    kinds = {"projected": ProjectedDiscriminator, "residual": ResidualDiscriminator}
    return generator, kinds[config.discriminator](config)
