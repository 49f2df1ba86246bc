"""Image k follows from (seed, label, k), however many are asked for."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.pictures import to_uint8
from models import build
from models.config import STYLE_DIM, ModelConfig, improved_config
from training import checkpoint
from training.config import TrainConfig
from training.sampling import Sampler, closed_walk, load_sampler
from training.trainer import Trainer

CPU = torch.device("cpu")


def sampler(num_classes=3, truncation=1.0):
    torch.manual_seed(0)
    config = ModelConfig("dcgan", 16, 10, num_classes, (16, 8), (8, 16))
    labels = ["benign", "gleason3", "gleason4"][:num_classes]
    return Sampler(build(config)[0], config, labels, [70, 20, 10][:num_classes], CPU, truncation=truncation)


def test_an_image_does_not_depend_on_how_many_were_asked_for():
    many = sampler().sample(37, seed=1, label="benign")
    for count, start in ((1, 0), (5, 0), (16, 16), (3, 34)):
        assert np.array_equal(sampler().sample(count, 1, "benign", start), many[start : start + count])


def test_seed_and_label_matter():
    one = sampler().sample(4, 1, "benign")
    assert not np.array_equal(one, sampler().sample(4, 2, "benign"))
    assert not np.array_equal(one, sampler().sample(4, 1, "gleason3"))
    assert len({image.tobytes() for image in one}) == 4


def test_without_a_label_the_mixture_is_that_of_the_training_patches():
    names = sampler()._mixture(0, 3000, seed=0)
    assert [round(names.count(name) / 3000, 1) for name in ("benign", "gleason3", "gleason4")] == [0.7, 0.2, 0.1]
    assert sampler()._mixture(100, 50, seed=0) == names[100:150]


def test_unconditional_models_have_no_labels():
    assert sampler(0).sample(3, 0).shape == (3, 16, 16, 3)
    with pytest.raises(UserError, match="unconditional"):
        sampler(0).sample(3, 0, "benign")


def test_unknown_label_lists_the_known_ones():
    with pytest.raises(UserError, match="benign, gleason3, gleason4"):
        sampler().sample(1, 0, "gleason9")


def improved_sampler(labels=("benign", "gleason3", "gleason4", "unlabelled"), guidance=0.0, truncation=1.0):
    torch.manual_seed(0)
    config = improved_config(64, len(labels), discriminator="residual")
    return Sampler(build(config)[0], config, labels, [1] * len(labels), CPU, guidance, truncation)


def styles(sampler):
    z = torch.randn(500, STYLE_DIM, generator=torch.Generator().manual_seed(1))
    return torch.stack([sampler.generator._style(z, torch.full((500,), k)) for k in range(len(sampler.labels))])


def test_guidance_moves_labels_apart_and_nothing_else():
    plain, guided = (styles(improved_sampler(guidance=g)) for g in (0.0, 1.0))
    centre = plain[:3].mean(dim=(0, 1))
    own = plain[:3].mean(dim=1)
    assert torch.allclose(guided[:3].mean(dim=1) - own, own - centre, atol=0.05 * (own - centre).norm().item())
    within = [each[:3] - each[:3].mean(dim=1, keepdim=True) for each in (plain, guided)]
    assert torch.allclose(*within, atol=1e-5)
    assert torch.equal(guided[3], plain[3])  # unlabelled


def test_guidance_can_be_undone_and_is_not_saved():
    made, plain = improved_sampler(guidance=0.5), improved_sampler().sample(2, 0, "benign")
    assert not np.array_equal(made.sample(2, 0, "benign"), plain)
    assert np.array_equal(Sampler(made.generator, made.config, made.labels, [1] * 4, CPU).sample(2, 0, "benign"), plain)
    assert not any("shift" in name for name in made.generator.state_dict())


def test_guidance_where_there_are_no_labels_to_move_is_refused():
    with pytest.raises(UserError, match="leave it out"):
        improved_sampler(("benign", "unlabelled"), 1.0)
    with pytest.raises(UserError, match="leave it out"):
        Sampler(sampler().generator, sampler().config, ["benign"] * 3, [1] * 3, CPU, 1.0)


def test_truncation_brings_styles_to_their_labels_mean():
    plain, half = (styles(improved_sampler(guidance=1.0, truncation=t)) for t in (1.0, 0.5))
    mean = plain.mean(dim=1, keepdim=True)
    assert torch.allclose(half - mean, 0.5 * (plain - mean), atol=0.05 * (plain - mean).norm(dim=2).mean().item())


def test_unconditional_models_are_truncated_too():
    plain, half = (improved_sampler((), truncation=t).sample(2, 0) for t in (1.0, 0.5))
    assert plain.shape == half.shape and not np.array_equal(plain, half)


def test_truncation_brings_images_together():
    spread = [sampler(truncation=t).sample(16, 0, "benign").astype(float).std(0).mean() for t in (1.0, 0.5, 0.0)]
    assert spread[0] > spread[1] > spread[2] == 0


def test_walk_passes_its_stops_and_stays_on_the_sphere():
    stops = torch.nn.functional.normalize(torch.randn(4, 50), dim=1)
    walk = closed_walk(stops, 10)
    assert walk.shape == (40, 50)
    assert torch.allclose(walk[::10], stops, atol=1e-5)
    assert torch.allclose(walk.norm(dim=1), torch.ones(40), atol=1e-4)


def test_a_walk_of_the_improved_model_does_not_shake():
    config = improved_config(64, 0, discriminator="residual")
    walk = Sampler(build(config)[0], config, [], [], CPU).walk("", seed=3, stops=3, frames=4)
    assert len(walk) == 12 and torch.equal(walk[:, -2:], walk[:1, -2:].expand(12, 2))
    assert all(not torch.equal(a, b) for a, b in zip(walk[:-1], walk[1:], strict=True))


def sampler_state():
    model = ModelConfig("dcgan", 16, 10, 3, (16, 8), (8, 16))
    return Trainer(model, TrainConfig("x", "label"), ["benign", "gleason3", "gleason4"], [7, 2, 1], 10, CPU).state()


@pytest.mark.parametrize("name", ["model", "ema", "classes", "class_counts", "config"])
def test_a_checkpoint_that_lacks_something_is_one_sentence(name, tmp_path):
    state = sampler_state()
    del state[name]
    checkpoint.save(tmp_path / "a.pt", state)
    with pytest.raises(UserError, match=f"does not fit its own description .'{name}' is missing"):
        load_sampler(tmp_path / "a.pt", CPU)


@pytest.mark.parametrize(
    "changes",
    [{"classes": ["benign"]}, {"class_counts": [1] * 4}, {"config": "x"}]
    + [{"classes": [name, "gleason3", "gleason4"]} for name in ("../../x", "/x", "a\\..\\b", "..", ".", "", "a\0", 7, ["x"])],
)
def test_classes_that_the_network_does_not_have_are_refused(changes, tmp_path):
    checkpoint.save(tmp_path / "a.pt", sampler_state() | changes)
    with pytest.raises(UserError, match="does not fit its own description"):
        load_sampler(tmp_path / "a.pt", CPU)


def test_a_sampler_knows_what_its_classes_are(tmp_path):
    state = sampler_state()
    state["config"] |= {"condition": "isup+provider", "stain_normalize": "macenko"}
    checkpoint.save(tmp_path / "a.pt", state)
    found = load_sampler(tmp_path / "a.pt", CPU)
    assert (found.condition, found.stain_normalize) == ("isup+provider", "macenko")


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    state = sampler_state()
    state["ema"]["main.0.weight"][0, 0] = float("nan")
    checkpoint.save(tmp_path / "a.pt", state)
    with pytest.raises(UserError, match="had diverged"):
        load_sampler(tmp_path / "a.pt", CPU)


def test_to_uint8_covers_the_range():
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert to_uint8(image).tolist() == [[[[0, 128, 255]]]]
