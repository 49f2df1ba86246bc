"""The baseline's networks, objectives and averaged weights."""

import math

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import build
from models.config import ModelConfig, dcgan_config
from models.dcgan import from_legacy
from models.ema import calibrate_batch_norm, ema_decay, make_ema, update_ema
from models.losses import bce_discriminator_loss, non_saturating_generator_loss


@pytest.mark.parametrize("image_size", [64, 128, 256])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_shapes_and_range(image_size, num_classes):
    generator, discriminator = build(dcgan_config(image_size, num_classes))
    labels = torch.tensor([0, 4]) if num_classes else None
    images = generator(torch.randn(2, 100), labels)
    assert images.shape == (2, 3, image_size, image_size)
    assert images.abs().max() <= 1
    assert discriminator(images, labels).shape == (2,)


def test_the_label_reaches_both_networks():
    generator, discriminator = build(dcgan_config(64, 3))
    z = torch.randn(2, 100)
    images = generator(z, torch.tensor([0, 0]))
    assert not torch.allclose(images, generator(z, torch.tensor([1, 1])))
    nn.init.normal_(discriminator.projection.weight)
    discriminator.eval()
    assert not torch.allclose(discriminator(images, torch.tensor([0, 0])), discriminator(images, torch.tensor([1, 1])))


def test_config_survives_the_checkpoint_and_refuses_what_it_does_not_know():
    config = dcgan_config(128, 2)
    assert ModelConfig.from_dict(config.to_dict()) == config
    for damage in ({"model": "later"}, {"extra": 1}):
        with pytest.raises(UserError, match="version it was trained with"):
            ModelConfig.from_dict(config.to_dict() | damage)
    with pytest.raises(UserError, match="64, 128, 256"):
        dcgan_config(100, 0)


def test_discriminator_loss_against_its_formula():
    real, fake = torch.tensor([0.3, -1.0]), torch.tensor([0.7, 2.0])
    smoothing = 0.1

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x))

    expected = -sum((1 - smoothing) * log_sigmoid(x) + smoothing * log_sigmoid(-x) for x in (0.3, -1.0)) / 2
    expected -= sum(log_sigmoid(-x) for x in (0.7, 2.0)) / 2
    assert bce_discriminator_loss(real, fake, smoothing).item() == pytest.approx(expected, rel=1e-6)
    assert non_saturating_generator_loss(fake).item() == pytest.approx(-sum(log_sigmoid(x) for x in (0.7, 2.0)) / 2, rel=1e-6)


def test_half_life_is_a_half_life_whatever_the_batch_size():
    for batch in (1, 8, 64):
        weight = 1.0
        for step in range(6400 // batch):
            weight *= ema_decay(10**9 + step, batch, 6400.0)
        assert weight == pytest.approx(0.5)


def test_the_average_forgets_its_random_start():
    assert ema_decay(images_seen=8, batch_size=8, half_life=5000.0) < 1e-5


def test_average_follows_and_keeps_apart():
    source = nn.Linear(2, 1)
    average = make_ema(source)
    with torch.no_grad():
        source.weight.add_(1.0)
    before = average.weight.clone()
    update_ema(average, source, 0.75)
    assert torch.allclose(average.weight, before + 0.25)
    assert not average.training and not average.weight.requires_grad


def test_calibrated_statistics_are_those_of_the_networks_own_activations():
    torch.manual_seed(0)
    generator, _ = build(dcgan_config(64, 0))
    batches = [(torch.randn(16, 100), None) for _ in range(4)]
    calibrate_batch_norm(generator, [(torch.randn(16, 100) + 5, None)])  # what was found before must not count
    calibrate_batch_norm(generator, batches)
    first = generator.main[1]
    outputs = torch.cat([generator.main[0](z[:, :, None, None]) for z, _ in batches])
    assert torch.allclose(first.running_mean, outputs.mean((0, 2, 3)), atol=1e-4)
    assert not generator.training and first.momentum == 0.1


def legacy_networks(widths=(32, 16), latent=10):
    """Plain DCGAN networks of 16 px as the public example lays them out."""
    g = [nn.ConvTranspose2d(latent, widths[0], 4, 1, 0, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    g += [nn.ConvTranspose2d(widths[0], widths[1], 4, 2, 1, bias=False), nn.BatchNorm2d(widths[1]), nn.ReLU()]
    g += [nn.ConvTranspose2d(widths[1], 3, 4, 2, 1, bias=False), nn.Tanh()]
    d = [nn.Conv2d(3, widths[1], 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    d += [nn.Conv2d(widths[1], widths[0], 4, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.LeakyReLU(0.2)]
    d += [nn.Conv2d(widths[0], 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    return nn.Sequential(*g), nn.Sequential(*d)


def test_legacy_weights_give_the_same_images_and_judgements():
    g, d = (network.eval() for network in legacy_networks())
    config, g_state, d_state = from_legacy(g.state_dict(), d.state_dict())
    assert (config.image_size, config.latent_dim, config.num_classes) == (16, 10, 0)
    generator, discriminator = (network.eval() for network in build(config))
    generator.load_state_dict(g_state)
    discriminator.load_state_dict(d_state)
    z = torch.randn(3, 10)
    images = generator(z)
    assert torch.allclose(images, g(z[:, :, None, None]), atol=1e-6)
    assert torch.allclose(torch.sigmoid(discriminator(images)), d(images).flatten(), atol=1e-6)


def test_other_state_dicts_are_refused():
    with pytest.raises(UserError, match="not one of a plain DCGAN"):
        from_legacy(nn.Linear(3, 3).state_dict(), None)
