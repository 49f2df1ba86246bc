"""Defaults by model and objective; networks of a checkpoint against the flags."""

from argparse import Namespace

import pytest
import torch

from common.errors import UserError
from models.config import dcgan_config, improved_config
from training import options, presets
from training.config import TrainConfig

NOTHING = dict.fromkeys((*options.MODEL_FLAGS, "model"))
CPU = torch.device("cpu")


def flags(**typed) -> Namespace:
    return Namespace(**NOTHING | {"image_size": 64} | typed)


@pytest.mark.parametrize("model", ["dcgan", "improved"])
@pytest.mark.parametrize("objective", [None, "non_saturating", "hinge", "wgan", "relativistic"])
def test_defaults_are_settings_of_a_run(model, objective):
    config = TrainConfig("", "none", **presets.training_defaults(model, objective))
    assert (config.gradient_penalty > 0) == (objective == "wgan")
    assert (config.perceptual > 0) == (model == "improved")
    assert TrainConfig.from_dict(config.to_dict()) == config


def rates(capsys, **typed) -> tuple[float, float, str]:
    values = dict.fromkeys(options.RUN_FLAGS) | {"patches": "p", "condition": "none", "model": None} | typed
    config = presets.new_config(Namespace(**values), {}, set)
    return config.lr_g, config.lr_d, capsys.readouterr().out


def test_larger_batches_learn_at_larger_rates(capsys):
    assert rates(capsys) == rates(capsys, batch_size=8) == rates(capsys, batch_size=4) == (2e-3, 5e-4, "")
    g, d, said = rates(capsys, batch_size=32)
    assert (g, d) == (4e-3, 1e-3) and "--batch_size 32: --lr_g 0.004, --lr_d 0.001" in said
    assert rates(capsys, batch_size=256)[:2] == (4e-3, 1e-3)
    g, d, said = rates(capsys, batch_size=32, lr_g=1e-3)
    assert (g, d) == (1e-3, 1e-3) and "--lr_g" not in said
    assert rates(capsys, batch_size=32, model="dcgan") == (2e-4, 2e-4, "")


def test_penalties_follow_the_objective_and_dcgan_has_no_critic():
    assert presets.penalties("improved", "wgan") == {"r1": 0.0, "r2": 0.0, "gradient_penalty": 10.0}
    assert presets.penalties("improved", "non_saturating") == {"r1": 0.5, "r2": 0.0, "gradient_penalty": 0.0}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model": "dcgan", "objective": "wgan"}, "--objective wgan needs .* batch norm.*--model improved"),
        ({"model": "dcgan", "gradient_penalty": 10.0}, "--gradient_penalty needs .* batch norm.*--model improved"),
        ({"objective": "hinge", "label_smoothing": 0.1}, "--label_smoothing belongs to --objective non_saturating, and hinge"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, words):
    values = dict.fromkeys(options.RUN_FLAGS) | {"patches": "p", "condition": "none", "model": "improved"} | wrong
    with pytest.raises(UserError, match=words):
        presets.new_config(Namespace(**values), {}, set)


def test_the_preset_follows_the_machine_and_a_typed_one_wins():
    small, large = (presets.model_config(flags(), 3, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert small.g_channels[0] < large.g_channels[0]
    assert presets.model_config(flags(preset="gpu"), 3, CPU) == large
    assert presets.model_config(flags(model="dcgan"), 3, CPU) == dcgan_config(64, 3)


@pytest.mark.parametrize("size", [None, 64, 128, 256])
def test_small_images_are_painted_larger_and_the_baselines_are_not(size):
    improved = presets.model_config(flags(image_size=size), 3, CPU)
    assert improved.output_size == (size or 256)
    assert improved.image_size == presets.patch_size(flags(image_size=size)) == max(128, size or 256)
    baseline = presets.model_config(flags(model="dcgan", image_size=size), 3, CPU)
    assert baseline.output_size == baseline.image_size == presets.patch_size(flags(model="dcgan", image_size=size)) == (size or 256)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_maps_are_normalised_over_whole_images(size):
    assert presets.model_config(flags(image_size=size, norm="instance"), 3, CPU).window == 0
    with pytest.raises(UserError, match="whole images; leave --window 64 out"):
        presets.model_config(flags(image_size=size, norm="instance", window=64), 3, CPU)


def test_a_checkpoints_networks_are_kept():
    model = improved_config(64, 3, "gpu", attention=False)
    presets.check_same_networks(flags(preset="gpu", attention=False, norm="demodulation"), model)
    for name, value in (("preset", "cpu"), ("attention", True), ("norm", "instance"), ("grow_from", 16)):
        with pytest.raises(UserError, match=f"--{name} .* contradicts"):
            presets.check_same_networks(flags(**{name: value}), model)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("preset", ["cpu", "gpu", "large"])
def test_the_preset_is_read_off_the_networks(size, preset):
    assert presets.preset_of(improved_config(size, 4, preset)) == preset


def test_the_baseline_has_no_preset():
    assert presets.preset_of(dcgan_config(64, 4)) == ""
