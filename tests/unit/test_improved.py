"""The improved model: its networks, objectives, augmentation and schedules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import avg_pool2d

from common.errors import UserError
from models import build, losses
from models.augment import KINDS, MOST, Rows, adapt, augment
from models.config import (
    BEND_CHANNELS,
    FIELD_CHANNELS,
    FIELD_SIDE,
    NOISE_DIM,
    PLACE_DIM,
    STYLE_DIM,
    ModelConfig,
    View,
    improved_config,
)
from models.discriminators import ProjectedDiscriminator
from models.improved import BEND, Level, bend
from models.layers import (
    SelfAttention,
    SpectralNorm,
    StyledConv,
    activate,
    advance_spectral_norms,
    apart,
    cut_out,
    gathered,
    minibatch_deviation,
    scales,
    side_by_side,
    spectral,
    spectral_weights,
)
from models.layers import double as double_size
from training.config import TrainConfig
from training.dry_run import stages
from training.presets import training_defaults
from training.processes import Processes
from training.schedule import growth, learning_rate_factor, view_of
from training.step import STATISTICS, diversity, seen_by
from training.step import small as small_images
from training.trainer import Trainer
from training.verdict import History, collapses

LABELS = torch.tensor([0, 1, 2, 0])


def small(**changes):
    """An improved model of few maps at 64 pixels."""
    config = improved_config(64, 3, **{"discriminator": "residual"} | changes)
    narrow = (8, 4) if config.discriminator == "projected" else (4, 8, 8, 8, 8)[: len(config.d_channels)]
    return replace(config, g_channels=(8, 8, 8, 4), d_channels=narrow)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def double():
    """Rounding is amplified from step to step: in double precision what is left of it stays small."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_images_have_their_size_and_range(size):
    config = replace(improved_config(size, 0, discriminator="residual"))
    generator, discriminator = build(config)
    images = generator(torch.randn(2, config.latent_dim))
    assert images.shape == (2, 3, size, size) and images.abs().mean() < 1.5
    assert images.std() > 0.1
    assert discriminator(images).shape == (2, 1)


def test_images_painted_larger_come_out_averaged_and_are_learned_as_painted():
    config = small(reduced_to=32)
    large, averaged = (build(each)[0] for each in (replace(config, reduced_to=0), config))
    averaged.load_state_dict(large.state_dict())
    z = torch.randn(4, config.latent_dim)
    assert averaged(z, LABELS).shape == (4, 3, 32, 32)
    assert torch.equal(averaged(z, LABELS), avg_pool2d(large(z, LABELS), 2))
    assert torch.equal(averaged(z, LABELS, View(5.0, averaged=True)), averaged(z, LABELS)), "taught as it comes out"
    assert torch.equal(averaged(z, LABELS, View(6.0)), large(z, LABELS, View(6.0)))
    averaged.growth = 4.0
    assert averaged(z, LABELS).shape == (4, 3, 32, 32)
    assert (config.seen, config.grow_from, config.output_size) == (32, 64, 32)


def test_images_of_a_model_that_still_grows_come_enlarged_without_a_grid():
    config = small()
    generator, _ = build(config)
    generator.growth = 4.0
    z = torch.randn(4, config.latent_dim)
    painted, shown = generator(z, LABELS, View(4.0)), generator(z, LABELS)
    assert shown.shape == (4, 3, 64, 64)
    assert (avg_pool2d(shown, 4) - painted).std() < 0.3 * painted.std()
    steps = shown.diff(dim=-1).square().mean(dim=(0, 1, 2))[8:-8]  # repeated pixels would step at every fourth one alone
    assert steps.min() > 0.2 * steps.max()


def test_a_shifted_field_paints_the_same_tissue_elsewhere():
    config = small(attention=False)
    generator, _ = build(config)
    z = torch.randn(1, config.latent_dim)
    field = z[:, STYLE_DIM:-2].reshape(1, FIELD_CHANNELS + BEND_CHANNELS, FIELD_SIDE, FIELD_SIDE)
    field[:, FIELD_CHANNELS:] *= 0.5  # so that nothing is fetched from far beyond the canvas
    field = field.roll(-1, 3)
    moved = torch.cat([z[:, :STYLE_DIM], field.flatten(1), z[:, -2:]], dim=1)
    images, elsewhere = generator(z, LABELS[:1]), generator(moved, LABELS[:1])
    step = 64 // 8  # pixels of a position of the field
    assert not torch.allclose(images, elsewhere, atol=1e-2)
    # The last column of the field came round from the other side: what it reaches is left out, and on the left what may have been
    # fetched from beyond the canvas.
    assert torch.allclose(images[..., 2 * step : -step], elsewhere[..., step : -2 * step], atol=1e-4)


def test_every_part_of_the_latent_matters_and_the_label():
    config = small(layer_noise=True)
    generator = noisy(build(config)[0])
    z = torch.randn(1, config.latent_dim)
    image = generator(z, LABELS[:1])
    ends = [0, STYLE_DIM]
    for length in (FIELD_CHANNELS * FIELD_SIDE**2, BEND_CHANNELS * FIELD_SIDE**2, *[NOISE_DIM // 2] * 8, PLACE_DIM):
        ends.append(ends[-1] + length)
    assert ends[-1] == config.latent_dim
    noises = (f"noise of layer {layer} at {side}" for side in (8, 16, 32, 64) for layer in (1, 2))
    names = ("style", "field", "moves", *noises, "place")
    parts = {name: slice(start, end) for name, start, end in zip(names, ends, ends[1:], strict=False)}
    for name, part in parts.items():
        changed = z.clone()
        changed[:, part] = -changed[:, part] + 0.5
        assert not torch.allclose(image, generator(changed, LABELS[:1]), atol=1e-3), name
    assert not torch.allclose(image, generator(z, LABELS[1:2]), atol=1e-3)


def test_only_the_direction_of_the_style_matters():
    config = small()
    generator, z = build(config)[0], torch.randn(2, config.latent_dim)
    longer = torch.cat([3.0 * z[:, :STYLE_DIM], z[:, STYLE_DIM:]], dim=1)
    assert torch.allclose(generator(z, LABELS[:2]), generator(longer, LABELS[:2]), atol=1e-5)


def test_a_level_keeps_the_strength_of_its_maps():
    level = Level(64, 64, STYLE_DIM, "demodulation", False, False)
    style = activate(torch.randn(8, STYLE_DIM))
    maps = level(torch.randn(8, 64, 26, 26), style, scales([level.first, level.second], style))
    assert maps.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.07)


def test_a_strong_style_makes_no_strong_maps():
    layer, maps, style = StyledConv(8, 6, 3, STYLE_DIM, "demodulation"), torch.randn(2, 8, 9, 9), torch.randn(2, STYLE_DIM)
    scale = layer.style(style)
    stronger = scale * torch.tensor([1.0, 10.0])[:, None]
    torch.testing.assert_close(layer(maps, style, scale), layer(maps, style, stronger))


def test_attention_gives_each_position_a_mean_of_what_is_there():
    layer, maps = SelfAttention(8), torch.randn(2, 8, 5, 5)
    maps[:, 0] = 2.0
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.give.weight[:, 1:] = 0.0  # what is given is the same everywhere, what is asked for is not
    torch.testing.assert_close(layer(maps) - maps, layer.out(layer.give(maps)))


def test_instance_norm_starts_as_the_maps_themselves():
    layer, maps, style = StyledConv(4, 4, 1, STYLE_DIM, "instance"), torch.randn(2, 4, 9, 9), torch.zeros(2, STYLE_DIM)
    assert layer(maps, style, torch.ones(2, 4)).std().item() == pytest.approx(1.0, rel=0.05)


def test_noise_is_the_same_for_the_same_latent_and_of_no_place():
    config = small(layer_noise=True)
    generator = noisy(build(config)[0])
    sheet = generator.sheet.flatten(1)
    assert abs(sheet.mean()) < 0.01 and abs(sheet.std() - 1) < 0.01
    assert torch.equal(noisy(build(config)[0]).sheet, generator.sheet)
    z = torch.randn(3, config.latent_dim)
    assert torch.allclose(generator(z, LABELS[:3])[1:2], generator(z[1:2], LABELS[1:2]), atol=1e-5)
    z[:, -config.place_dim :] = torch.tensor([-9.0, 0.0, 9.0])[:, None]  # the sheet's corners are reached and not crossed
    places = z[:, -config.place_dim : -PLACE_DIM]
    corners = [noise[:, 0, 0, 0] for level in range(4) for noise in generator._noise(places, level, 8 * 2**level + 10)]
    assert all(len(set(values.tolist())) == 3 and values[0] == sheet[0, 0] for values in corners)


def test_a_checkpoint_from_before_the_bending_paints_what_it_painted():
    before = small().to_dict()
    del before["bent"], before["layer_noise"]
    before["latent_dim"] -= BEND_CHANNELS * FIELD_SIDE**2
    config = ModelConfig.from_dict(before)
    generator, _ = build(config)
    assert not config.bent and generator(torch.randn(2, config.latent_dim), LABELS[:2]).shape == (2, 3, 64, 64)


def test_doubling_is_bilinear():
    maps = torch.randn(2, 3, 9, 8)
    expected = torch.nn.functional.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)
    assert torch.allclose(double_size(maps), expected[..., 1:-1, 1:-1], atol=1e-6)


def test_an_image_lies_in_the_same_part_of_its_canvas_while_it_grows():
    generator = build(small(grow_from=16))[0]
    places = torch.tensor([[-9.0, 0.0], [9.0, 9.0]])
    for side, corners in ((64, [(0, 3), (6, 6)]), (32, [(1, 3), (5, 5)])):
        whole = torch.arange(float((side + 6) ** 2)).reshape(1, 1, side + 6, side + 6).repeat(2, 3, 1, 1)
        shown = generator._shown(whole, places, side)
        assert [divmod(int(image[0, 0, 0]), side + 6) for image in shown] == corners


def test_a_resolution_fades_in_for_the_discriminator_from_the_one_before():
    discriminator, images = build(small(grow_from=16))[1], torch.rand(4, 3, 64, 64) * 2 - 1
    found = []
    for images_, reached in ((avg_pool2d(images, 2), 5.0), (images, 5.0 + 1e-4), (images, 6.0)):
        discriminator.growth = reached
        found.append(discriminator(images_, LABELS))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found[1], found[2], atol=1e-2)


@pytest.mark.parametrize("kind", ["residual", "projected"])
def test_the_discriminator_judges_each_image_by_its_own_label(kind):
    config = small(discriminator=kind)
    discriminator = build(config)[1] if kind == "residual" else ProjectedDiscriminator(config, pretrained=False)
    maps = discriminator.look(torch.rand(4, 3, 64, 64) * 2 - 1)
    before = discriminator.judge(maps, LABELS)
    for index in range(4):
        changed = LABELS.clone()
        changed[index] = (changed[index] + 1) % 3
        moved = (discriminator.judge(maps, changed) - before).abs().amax(dim=1) > 1e-5
        assert moved.tolist() == [number == index for number in range(4)]


@pytest.mark.parametrize("image_size, grow_from, window", [(128, 16, None), (256, 16, None), (256, 32, 256)])
def test_heads_judge_images_that_are_too_small_for_all_their_halvings(image_size, grow_from, window):
    config = replace(improved_config(image_size, 3, grow_from=grow_from, window=window), d_channels=(8, 4))
    discriminator = ProjectedDiscriminator(config, pretrained=False)
    discriminator.set_view(View(math.log2(grow_from)))
    logits = discriminator(torch.randn(4, 3, image_size, image_size), LABELS)
    assert logits.shape == (4, 5) and torch.isfinite(logits).all()


def test_maps_are_bent_by_their_strength_and_never_to_where_nothing_is():
    noise, side = torch.randn(64, BEND_CHANNELS, FIELD_SIDE, FIELD_SIDE), 22
    assert torch.allclose(bend(torch.ones(64, 1, side, side), noise), torch.ones(()), atol=1e-5)
    across = torch.arange(float(side)).expand(64, 1, side, side)
    moves = (bend(across, noise) - across)[..., 5:-5]
    assert moves.std().item() == pytest.approx(BEND, rel=0.2)


def test_places_are_bent_to_in_full_precision():
    maps, noise = torch.randn(2, 3, 22, 22), torch.randn(2, BEND_CHANNELS, FIELD_SIDE, FIELD_SIDE)
    bent = bend(maps, noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(bend(maps, noise), bent, atol=1e-4)


def test_the_projected_discriminator_learns_in_its_heads_only():
    config = small(discriminator="projected")
    _, discriminator = build(config)
    discriminator.train()
    before = {name: value.clone() for name, value in discriminator.backbone.network.state_dict().items()}
    logits = discriminator(torch.rand(4, 3, 64, 64) * 2 - 1, LABELS)
    assert logits.shape == (4, 5)
    logits.sum().backward()
    backbone = discriminator.backbone.network
    assert all(parameter.grad is None for parameter in (*backbone.parameters(), *discriminator.mixing.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not any(name.startswith("backbone") for name in discriminator.state_dict())
    old = discriminator.state_dict() | {"backbone.network.conv_stem.weight": torch.zeros(1)}
    discriminator.load_state_dict(old)  # checkpoints of before held the frozen weights


def test_objectives_at_known_logits():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert losses.discriminator_loss("hinge", real, fake).item() == pytest.approx(0.5 + 0.75)
    assert losses.discriminator_loss("wgan", real, fake).item() == pytest.approx(-0.75 - 1.0)
    expected = (math.log1p(math.exp(-4.0)) + math.log1p(math.exp(0.5))) / 2
    assert losses.discriminator_loss("relativistic", real, fake).item() == pytest.approx(expected)
    assert losses.generator_loss("hinge", fake, real).item() == pytest.approx(0.75)
    for objective in losses.OBJECTIVES:
        fooled, caught = (losses.generator_loss(objective, torch.full((2,), value), real) for value in (3.0, -3.0))
        assert fooled < caught


class Linear(torch.nn.Module):
    """Logits 3 times the sum of the first pixel: a gradient of known norm."""

    def judge(self, maps, labels=None):
        return 3.0 * maps[0][:, 0, 0, 0]


def test_penalties_of_a_known_slope():
    images = torch.randn(4, 3, 8, 8)
    assert losses.squared_gradient(Linear(), [images], None).item() == pytest.approx(9.0)
    share = torch.rand(4, 1, 1, 1)
    assert losses.gradient_penalty(Linear(), [images], [images + 1], None, share).item() == pytest.approx(4.0, rel=1e-4)


def test_energy_distance_asks_for_the_right_place_and_for_variety():
    def batch(offset, spread):
        return [losses.statistics(offset + spread * torch.randn(64, 1, 1, 1) + torch.randn(64, 8, 6, 6) * 0.1 + 3.0)]

    labels = torch.arange(64) % 2
    real = batch(0.0, 1.0)
    alike, shifted, collapsed = (losses.energy_distance(real, fake, None) for fake in (batch(0, 1), batch(2, 1), batch(0, 0.0)))
    assert alike < shifted and alike < collapsed
    swapped = [real[0] + 2.0 * labels[:, None]]
    right, wrong = losses.energy_distance(swapped, swapped, labels), losses.energy_distance(swapped, swapped, 1 - labels)
    assert right == wrong  # the labels of both sides are the batch's: a swap of names changes nothing
    mixed = [swapped[0].flip(0)]
    assert losses.energy_distance(swapped, mixed, labels) > right


def noisy(generator):
    """The generator, whose layers now add noise as a trained one's do."""
    for level in generator.levels:
        level.noise.data.fill_(0.3)
    return generator


def test_a_window_is_a_part_of_the_whole_image():
    config = small(window=32, layer_noise=True)
    generator = noisy(build(config)[0])
    generator.levels[1].attention.weight.data.fill_(0.5)
    z = torch.randn(2, config.latent_dim)
    z[:, -2:] = 0.0  # shown from the middle of the canvas
    for growth_ in (6.0, 5.5):
        generator.growth = growth_
        window = generator(z, LABELS[:2], View(growth_, windowed=True))
        assert torch.allclose(window, generator(z, LABELS[:2])[..., 16:48, 16:48], atol=1e-5)
    assert generator(z, LABELS[:2], View(5.0)).shape == (2, 3, 32, 32)


def test_large_images_are_seen_in_turn_as_windows_and_whole():
    assert view_of(5.5, 64, 0, 8) == View(5.5) and View(5.5).side == 64
    turns = [view_of(7.5, 128, step, 8) for step in range(32)]
    assert set(turns) == {View(7.5, windowed=True), View(7.0)} and {view.side for view in turns} == {128}
    assert sum(view.windowed for view in turns) == 16
    assert {view.windowed for view in turns[::8]} == {True, False}  # both are penalised
    assert {view_of(7.0, 64, step, 8, averaged=True) for step in range(4)} == {View(7.0, windowed=True), View(6.0, averaged=True)}
    assert View(6.0) in [view_of(6.5, 64, step, 8, averaged=True) for step in range(4)], "nothing to average before it has grown"


def test_windows_of_real_images_lie_at_their_corners():
    images, corners = torch.arange(64.0 * 64).reshape(1, 1, 64, 64).repeat(2, 3, 1, 1), torch.tensor([[0.3, 31.9], [32.0, 5.5]])
    windows = seen_by(View(6.0, windowed=True), images, corners)
    assert windows.shape == (2, 3, 32, 32) and windows[:, 0, 0, 0].tolist() == [31, 32 * 64 + 5]
    assert torch.equal(seen_by(View(5.0), images, None), avg_pool2d(images, 2)) and seen_by(None, images, None) is images


def test_detail_fades_in_in_real_images_as_in_generated_ones():
    images = torch.randn(2, 3, 64, 64)
    detail = [(seen_by(View(growth_), images, None) - images).square().mean() for growth_ in (5.01, 5.5, 5.99, 6.0)]
    assert detail[0] > 2 * detail[1] > 4 * detail[2] > 0.0 == detail[3]
    half = seen_by(View(5.5), images, None)
    assert torch.equal(seen_by(View(5.5, share=torch.tensor(0.5)), images, None), half)
    assert torch.equal(seen_by(View(5.5, windowed=True), images, torch.full((2, 2), 7.0)), half[..., 7:39, 7:39])
    before = avg_pool2d(images, 2)
    assert (avg_pool2d(half, 2) - before).std() < 0.3 * before.std(), "what was there before stays"


def test_squares_are_cut_alike_by_slices_and_by_indices():
    images, corners = torch.randn(3, 2, 20, 20), torch.tensor([[0, 9], [10, 0], [3, 4]])
    assert torch.equal(cut_out(images, corners, 10), gathered(images, corners, 10))
    assert torch.equal(gathered(images, corners, 10)[2], images[2, :, 3:13, 4:14])


def test_real_and_generated_images_are_judged_together_as_by_themselves():
    real, fake = torch.randn(2, 8, 3, 4, 4)
    both = minibatch_deviation(side_by_side(real, fake))
    for one, alone in zip(apart(both), (real, fake), strict=True):
        torch.testing.assert_close(one, minibatch_deviation(alone))
    assert not torch.allclose(apart(both)[0][:, 3], apart(both)[1][:, 3])


def test_images_that_are_alike_show_in_their_own_group():
    maps = torch.randn(8, 3, 4, 4)
    maps[::2] = maps[:1]  # groups stride through the batch: one of the even images, one of the odd ones
    column = minibatch_deviation(maps)[:, 3, 0, 0]
    assert (column[::2] < 1e-3).all() and (column[1::2] > 0.3).all()


def test_styles_taken_in_one_product_are_those_of_the_layers():
    generator, style = build(small())[0], torch.randn(4, STYLE_DIM)
    layers = [layer for level in generator.levels for layer in (level.first, level.second, level.color)]
    for values, layer in zip(scales(layers, style), layers, strict=True):
        torch.testing.assert_close(values, layer.style(style))


@pytest.mark.parametrize(
    "make", [lambda: torch.nn.Conv2d(8, 6, 4), lambda: torch.nn.Linear(7, 1), lambda: torch.nn.Embedding(5, 9)]
)
def test_spectral_norms_are_those_of_pytorch_layer_by_layer_or_all_at_once(make):
    layers = make(), make()
    theirs = [torch.nn.utils.parametrizations.spectral_norm(layer) for layer in layers]
    ours = torch.nn.ModuleList(spectral(make()) for _ in layers)
    for mine, other in zip(ours, theirs, strict=True):
        assert [name for name, _ in mine.named_parameters()] == [name for name, _ in other.named_parameters()]
        mine.load_state_dict(other.state_dict())  # checkpoints of before hold theirs
    weights = torch.randn(ours[0].weight.shape)
    for _ in range(3):
        advance_spectral_norms(ours)
        expected = [other.weight for other in theirs]  # each use takes a step
        with spectral_weights(ours):
            held = [mine.weight for mine in ours]
            assert held[0] is ours[0].weight
        for mine, together, other, wanted in zip(ours, held, theirs, expected, strict=True):
            torch.testing.assert_close(together, wanted)
            torch.testing.assert_close(mine.weight, wanted)
            gradients = [
                torch.autograd.grad((value * weights).sum(), layer.parametrizations.weight.original, retain_graph=True)[0]
                for value, layer in ((together, mine), (wanted, other))
            ]
            torch.testing.assert_close(*gradients)


def test_a_spectral_norm_holds_the_largest_singular_value_at_one():
    layer = spectral(torch.nn.Linear(20, 12))
    assert isinstance(layer.parametrizations.weight[0], SpectralNorm)
    for _ in range(200):
        advance_spectral_norms(layer)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1.0, abs=1e-3)


def test_discriminators_tell_windows_from_whole_images():
    for classes, labels in ((3, LABELS), (0, None)):
        config = replace(improved_config(64, classes, window=32, discriminator="residual"), d_channels=(4, 8, 8, 8))
        _, discriminator = build(config)
        images = torch.rand(4, 3, 32, 32)
        discriminator.set_view(View(6.0, windowed=True))
        window = discriminator.judge(discriminator.look(images), labels)
        discriminator.set_view(View(5.0))
        whole = discriminator.judge(discriminator.look(images), labels)
        assert not torch.allclose(window, whole)
        assert discriminator(torch.rand(4, 3, 64, 64), labels).shape == (4, 1)  # whole images at any size, halved
    with pytest.raises(UserError, match="window 64 is less than half of image_size 256"):
        improved_config(256, 3, window=64)


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_changes_chosen_images_and_passes_gradients(kind):
    images = torch.nn.functional.avg_pool2d(torch.rand(8, 3, 64, 64), 3, 1, 1) * 1.6 - 0.8
    assert augment(images, 0.0, (kind,)) is images
    images.requires_grad_()
    changed = augment(images, 1.0, (kind,))
    assert changed.shape == images.shape and not torch.allclose(changed, images)
    assert (changed - images).abs().mean() < 0.5
    changed.square().sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0
    some = augment(images.detach(), 0.5, (kind,)) != images.detach()
    assert 0 < some.flatten(1).any(dim=1).sum() < 8


def test_augmentation_never_shows_what_lies_beyond_the_border():
    images = torch.full((8, 3, 64, 64), 0.7)
    assert torch.allclose(augment(images, 1.0, ("translation", "elastic")), images, atol=1e-5)


def test_augmentation_is_as_strong_as_it_says():
    ramp = torch.arange(64.0).expand(64, 3, 64, 64) / 32 - 1  # a pixel is 1 / 32
    shifted = (augment(ramp, 1.0, ("translation",)) - ramp)[..., 8:-8].abs().amax(dim=(1, 2, 3)) * 32
    assert 6 < shifted.max() < 8.01
    bent = (augment(ramp, 1.0, ("elastic",)) - ramp)[..., 8:-8].abs().amax() * 32
    assert 1 < bent < 2 * 0.03 * 64, "the cubic between its points goes beyond them"
    noise = (augment(ramp, 1.0, ("noise",)) - ramp).std(dim=(1, 2, 3))
    assert 0.08 < noise.max() < 0.11 and noise.min() < 0.02


def test_augmentation_without_strength_leaves_images_as_they_are(monkeypatch):
    monkeypatch.setattr(
        Rows, "rand", lambda rows, *shape, device: torch.full((rows.total, *shape), 0.5)
    )  # the middle of all ranges
    images = torch.rand(4, 3, 64, 64) * 1.6 - 0.8
    for kind in set(KINDS) - {"noise"}:
        assert torch.allclose(augment(images, 1.0, (kind,)), images, atol=1e-4), kind


def test_augmentation_strength_follows_the_discriminator_and_is_bounded():
    assert adapt(0.1, 0.95, 1000) > 0.1 > adapt(0.1, 0.5, 1000)
    assert adapt(0.1, 0.95, 1000, pairs=True) > 0.1 > adapt(0.1, 0.9, 1000, pairs=True)  # easier than by themselves
    assert adapt(MOST, 1.0, 10**6) == MOST and adapt(0.0, 0.0, 1000) == 0.0


def test_schedules_are_functions_of_images_seen():
    assert learning_rate_factor(0, 0, "none", 100) == 1.0
    assert learning_rate_factor(499, 1000, "none", 10**6) == pytest.approx(0.5)
    assert learning_rate_factor(5000, 0, "cosine", 10_000) == pytest.approx(0.5)
    assert learning_rate_factor(10_000, 0, "cosine", 10_000) == pytest.approx(0.0)
    late = [learning_rate_factor(images, 1000, "late", 10_000) for images in (499, 7_500, 8_750, 10_000, 12_000)]
    assert late == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.0])
    assert [growth(images, 16, 64, 100) for images in (0, 99, 150, 200, 350, 400, 9999)] == [4, 4, 4.5, 5, 5.5, 6, 6]
    assert growth(0, 64, 64, 100) == 6.0


def test_diversity_is_measured_beside_real_batches():
    real = small_images(torch.rand(8, 3, 64, 64))
    assert real.shape == (8, 3, 8, 8)
    assert diversity(real, real).item() == pytest.approx(1.0, rel=1e-3)
    assert diversity(real[:1].repeat(8, 1, 1, 1), real) == 0.0


def test_a_collapse_is_named_in_plain_words():
    lines = [{"images": 10_000 + 100 * k, "loss_d": 0.5, "diversity": 0.2} for k in range(20)]
    assert "mode collapse" in collapses(History(lines, []))
    assert collapses(History([line | {"diversity": 0.8} for line in lines], [])) == ""
    assert collapses(History(lines[:3], [])) == ""


def test_the_stages_of_a_dry_run_cover_the_run():
    run = trainer(grow_images=1000)
    assert stages(run) == [(0, 1000), (1000, 10_000)]
    run = trainer(grow_images=50_000)
    assert stages(run) == [(0, 10_000)]


def trainer(objective="hinge", discriminator="residual", window=None, **changes):
    settings = training_defaults("improved", objective) | {"objective": objective, "batch_size": 4, "penalty_every": 2}
    config = TrainConfig("", "label", epochs=1, **settings | changes)
    model = small(discriminator=discriminator, grow_from=32, window=window)
    return Trainer(model, config, list("abc"), [9, 9, 9], 10_000, torch.device("cpu"))


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
@pytest.mark.parametrize("discriminator", ["residual", "projected"])
def test_every_objective_takes_steps_with_every_discriminator(objective, discriminator):
    run = trainer(objective, discriminator, perceptual=0.0, adaptive=[], warmup_images=0)
    before = [parameter.clone() for parameter in run.step.generator.parameters()]
    for _ in range(2):
        assert run.train_on(torch.rand(4, 3, 64, 64) * 2 - 1, LABELS).isfinite().all()
    changed = [not torch.equal(a, b) for a, b in zip(before, run.step.generator.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize(("discriminator", "window", "taught"), [("residual", 32, [3, 2]), ("projected", None, [5, 0])])
def test_a_restored_run_goes_on_bit_for_bit(discriminator, window, taught):
    batches = [torch.rand(4, 3, 64, 64) * 2 - 1 for _ in range(5)]
    whole = trainer(discriminator=discriminator, window=window, grow_images=4, grading=1.0)
    whole.strength = 0.4
    for batch in batches[:3]:
        whole.train_on(batch, LABELS)
    state = whole.state()
    state = {name: (value.copy() if isinstance(value, dict) else value) for name, value in state.items()}
    again = trainer(discriminator=discriminator, window=window, grow_images=4, grading=1.0)
    again.restore(torch.load(_stored(state), weights_only=True))
    for batch in batches[3:]:
        assert torch.equal(whole.train_on(batch, LABELS), again.train_on(batch, LABELS))
    assert again.strength == whole.strength and len(again._verdicts) == len(whole._verdicts)
    assert str(whole.step.graders.state_dict()) == str(again.step.graders.state_dict())
    assert [grader.steps.item() for grader in again.step.graders] == taught  # by whole images and by windows
    for name, value in whole.step.generator.state_dict().items():
        other = again.step.generator.state_dict()[name]
        assert value == other if isinstance(value, float) else torch.equal(value, other)
    assert all(torch.equal(a, b) for a, b in zip(whole.ema.parameters(), again.ema.parameters(), strict=True))


def test_the_average_paints_at_the_size_that_the_generator_has_reached():
    run = trainer(grow_images=4)
    for run.images, reached, side in ((0, 5.0, 32), (6, 5.5, 64), (8, 6.0, 64)):
        run._view(4)
        assert run.ema.growth == run.step.generator.growth == reached and run.resolution == side


@pytest.mark.parametrize(("objective", "discriminator"), [("relativistic", "projected"), ("wgan", "residual")])
def test_a_batch_in_parts_is_the_same_step(discriminator, objective, double):
    same = {"batch_size": 16, "warmup_images": 0, "adaptive": list(KINDS), "grow_images": 4, "window": 32, "grading": 1.0}
    runs = [trainer(objective, discriminator, **same) for _ in range(2)]
    runs[1].divide()
    runs[1].divide()
    assert runs[1].step.parts == 4 and not runs[1].divide()
    labels = torch.arange(16) % 3
    for run in runs:
        run.images = 64  # grown: the next step sees windows and takes the penalties, the one after it sees whole images
    for step in range(2):
        batch = torch.nn.functional.avg_pool2d(torch.rand(16, 3, 64, 64), 5, 1, 2) * 2 - 1
        for run in runs:
            run.strength = 0.5
        whole, parts = (run.train_on(batch, labels) for run in runs)
        numbers = [STATISTICS.index(name) for name in STATISTICS if not name.startswith("acc")]  # shares of each part's own border
        assert torch.allclose(whole[numbers], parts[numbers], rtol=1e-7), (step, whole, parts)
    states = [run.step.generator.state_dict() for run in runs]
    assert all(torch.allclose(a, states[1][name], rtol=1e-7) for name, a in states[0].items() if torch.is_tensor(a))


@pytest.mark.parametrize(("objective", "discriminator"), [("relativistic", "projected"), ("wgan", "residual")])
def test_half_precision_takes_nearly_the_same_step(objective, discriminator):
    batch = torch.nn.functional.avg_pool2d(torch.rand(4, 3, 64, 64), 5, 1, 2) * 2 - 1
    found = []
    for half in (False, True):
        run = trainer(objective, discriminator, warmup_images=0)
        run.step.half, run.strength = half, 0.5
        statistics = run.train_on(batch, LABELS)
        assert statistics.dtype == torch.float32
        found.append((statistics, [p.grad.flatten() for p in run.step.generator.parameters() if p.grad is not None]))
        assert all(p.dtype == torch.float32 for p in run.step.generator.parameters())
    assert not torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][0][:2], found[1][0][:2], rtol=0.05, atol=0.01)
    assert torch.cosine_similarity(torch.cat(found[0][1]), torch.cat(found[1][1]), dim=0) > 0.9


@pytest.mark.slow
def test_a_compiled_generator_takes_the_same_steps():
    batch = torch.rand(4, 3, 64, 64) * 2 - 1
    plain, compiled = trainer(grow_images=4), trainer(grow_images=4)
    compiled.speed_up(half=False, compiled=True)
    for _ in range(3):
        assert torch.allclose(plain.train_on(batch, LABELS), compiled.train_on(batch, LABELS), rtol=1e-3)
    assert plain.state()["ema"].keys() == compiled.state()["ema"].keys()
    assert plain.state()["generator"].keys() == compiled.state()["generator"].keys()


def test_a_batch_must_divide_among_the_processes():
    with pytest.raises(UserError, match="must be a multiple of 8 .* choose 16"):
        Trainer(small(), TrainConfig("", "label", batch_size=12), [], [], 8, torch.device("cpu"), Processes(0, 2))


def _stored(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
def test_what_is_judged_rightly_does_not_hang_on_an_offset_that_the_objective_leaves_free(objective):
    real, fake = torch.tensor([2.0, 1.0, -0.5, 3.0]), torch.tensor([-1.0, 0.5, -2.0, 3.5])
    shares = [tuple(share.item() for share in losses.judged_rightly(objective, real + by, fake + by)) for by in (-5.0, 0.0, 5.0)]
    if objective in losses.RELATIVE:
        assert shares == [(0.75, 0.75)] * 3
        of_outputs = [torch.stack([logits, logits + 100.0], dim=1) for logits in (real, fake)]  # each with a level of its own
        assert [share.item() for share in losses.judged_rightly(objective, *of_outputs)] == [0.75, 0.75]
    else:
        assert shares == [(0.0, 1.0), (0.75, 0.5), (1.0, 0.0)]
