"""A training step is what its papers say: done again here by hand, in double precision, on networks of one hidden layer."""

from __future__ import annotations

import copy
import importlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from data.augment import Augmentation
from data.dataset import PatchDataset
from data.manifest import Patch, write_manifest
from models.augment import ADAPT_IMAGES, Rows, augment
from models.config import dcgan_config, improved_config
from models.losses import RELATIVE
from training import checkpoint, options, resume
from training import step as step_module
from training.config import TrainConfig
from training.guard import DivergedError, check_finite
from training.step import STATISTICS, Batch, GanStep
from training.trainer import ADAPT_STEPS, Trainer

SIDE, LATENT, CLASSES = 16, 5, 3
LABELS = torch.tensor([0, 1, 2, 0])
RATE, EVERY = 0.5, 3  # warm-up factor of the steps by hand, and penalty_every


@pytest.fixture
def double():
    """Then rounding cannot hide a wrong term, nor look like one."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- the networks


class Painter(nn.Module):
    """G."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(LATENT + CLASSES, 3 * SIDE**2)

    def forward(self, z, labels):
        values = self.layer(torch.cat([z, F.one_hot(labels, CLASSES).to(z.dtype)], dim=1))
        return torch.tanh(values).unflatten(1, (3, SIDE, SIDE))


class Critic(nn.Module):
    """D, two logits an image. Two maps, as penalties count all of them; curved, since a plane is as steep on real as on fake."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 2, 8, 8) for _ in range(2))
        self.out, self.label = nn.Linear(10, 2), nn.Embedding(CLASSES, 10)
        nn.init.normal_(self.out.weight)

    def look(self, images):
        return [images, F.avg_pool2d(images, 2)]

    def judge(self, maps, labels):
        hidden = torch.cat([torch.tanh(layer(item)).flatten(1) for layer, item in zip(self.layers, maps, strict=True)], dim=1)
        return self.out(hidden) + (self.label(labels) * hidden).sum(dim=1, keepdim=True)


class Projected(Critic):
    """What it looks at besides the images stands for frozen features, which teach as well."""

    backbone = None


class Teacher(nn.Module):
    """In place of EfficientNet: one frozen convolution for each of four maps."""

    fine = (2, 2, 2, 2)

    def maps(self, images, stages):
        random = torch.Generator().manual_seed(0)
        kernels = torch.randn(len(self.fine), 2, 3, 4, 4, generator=random)
        return [torch.tanh(F.conv2d(images, kernels[stage], stride=2)) for stage in stages]


# -- the same step by hand


def smoothed(real, fake, smoothing):
    """Goodfellow et al. (2014) with real's target at 1 - s (Salimans et al. 2016)."""
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    return -((1 - smoothing) * p.log() + smoothing * (1 - p).log()).mean() - (1 - q).log().mean()


# objective -> what D minimises of (real, fake, smoothing), and G of (fake, real), as in the papers
PAPERS = {
    "non_saturating": (smoothed, lambda fake, real: -torch.sigmoid(fake).log().mean()),
    # Lim and Ye (2017): D maximises E min(0, -1 + D(x)) + E min(0, -1 - D(G(z)))
    "hinge": (
        lambda real, fake, _: -(real - 1).clamp(max=0).mean() - (-1 - fake).clamp(max=0).mean(),
        lambda fake, real: -fake.mean(),
    ),
    # Arjovsky et al. (2017): D maximises E D(x) - E D(G(z))
    "wgan": (lambda real, fake, _: -(real.mean() - fake.mean()), lambda fake, real: -fake.mean()),
    # Jolicoeur-Martineau (2019): the probability that a real image is more real than a generated one, and the other way round
    "relativistic": (
        lambda real, fake, _: -torch.sigmoid(real - fake).log().mean(),
        lambda fake, real: -torch.sigmoid(fake - real).log().mean(),
    ),
}


def slopes(critic, maps, labels):
    """Squared norm of the gradient of each image's logits with respect to all that D looks at, (N,)."""
    maps = [item.detach().requires_grad_() for item in maps]
    found = torch.autograd.grad(critic.judge(maps, labels).sum(), maps, create_graph=True)
    return sum(item.square().flatten(1).sum(dim=1) for item in found)


def penalties(config, critic, real, fake, labels):
    """R1 on real and R2 on fake (Mescheder et al. 2018), WGAN-GP on mixtures (Gulrajani et al. 2017), a quarter of fake in them."""
    mixed = [0.75 * a + 0.25 * b for a, b in zip(real, fake, strict=True)]
    total = config.r1 / 2 * slopes(critic, real, labels).mean() + config.r2 / 2 * slopes(critic, fake, labels).mean()
    return total + config.gradient_penalty * (slopes(critic, mixed, labels).sqrt() - 1).square().mean()


def means_and_deviations(maps):
    return torch.cat([maps.mean(dim=(2, 3)), (maps.var(dim=(2, 3), correction=0) + 1e-6).sqrt()], dim=1)


def energy_distance(real, fake, labels):
    """2 E|fake - real| - E|fake - fake'| (Szekely and Rizzo 2013), an image at a time; another label is one further apart."""
    scale, count, total = real.square().mean().sqrt() + 1e-8, len(fake), 0.0
    for i in range(count):
        for j in range(count):
            for other, weight in ((real, 2 / count**2), (fake, -1 / (count * (count - 1)))):
                squared = ((fake[i] - other[j]) / scale).square().mean() + float(labels[i] != labels[j])
                total = total + weight * (squared + 1e-6).sqrt()
    return total


def lacking_clarity(grader, optimizer, real, fake, labels):
    """Logistic regression on standardised features learns from real ones; then how much less clear the labels of fake ones are."""
    real, fake = torch.cat(real, dim=1), torch.cat(fake, dim=1)
    grader.steps += 1
    grader.mean += (real.mean(dim=0) - grader.mean) / grader.steps
    grader.square += (real.square().mean(dim=0) - grader.square) / grader.steps

    def cross_entropy(features):
        standard = (features - grader.mean) / (grader.square - grader.mean**2).sqrt()
        shares = torch.softmax(grader.linear(standard), dim=1)
        return -torch.stack([shares[row, label] for row, label in enumerate(labels)]).log().mean()

    loss = cross_entropy(real)
    grader.clear += (loss.detach() - grader.clear) / grader.steps
    learn(optimizer, loss + 0.03 * grader.linear.weight.square().sum())
    lacking = cross_entropy(fake) - grader.clear
    assert lacking > 0, "with another seed: nothing would be asked for, and nothing held here"
    return lacking


def learn(optimizer, loss):
    """One update; the gradients."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
    return [parameter.grad for parameter in parameters]


class ByHand:
    """The same networks as a GanStep's, and its step as the papers have it."""

    def __init__(self, step, config):
        self.config = config
        self.painter, self.critic, self.graders = copy.deepcopy((step.generator, step.discriminator, step.graders))
        rates = ((self.painter, RATE * config.lr_g), (self.critic, RATE * config.lr_d))
        self.opt_g, self.opt_d = (torch.optim.Adam(network.parameters(), rate, tuple(config.betas)) for network, rate in rates)
        self.opt_c = torch.optim.Adam(self.graders[0].parameters(), 5e-4, (0.9, 0.999)) if config.grading else None

    def __call__(self, batch, penalise):
        """One update of both networks: gradients of D, of G, and the step's statistics by name."""
        config, critic, labels = self.config, self.critic, batch.labels
        d_loss, g_loss = PAPERS[config.objective]
        fake = self.painter(batch.z, labels)
        seen = [augment(images, batch.strength, tuple(config.adaptive)) for images in (batch.real, fake)]
        real_maps, fake_maps = (critic.look(images) for images in seen)
        known = [item.detach() for item in fake_maps]
        real_logits, fake_logits = critic.judge(real_maps, labels), critic.judge(known, labels)
        loss_d = d_loss(real_logits, fake_logits, config.label_smoothing)
        # Taken every so many steps, they are so much stronger (Karras et al., StyleGAN2, 2020).
        regularised = loss_d + EVERY * penalties(config, critic, real_maps, known, labels) if penalise else loss_d
        gradients_d = learn(self.opt_d, regularised)
        loss_g = g_loss(critic.judge(fake_maps, labels), critic.judge(real_maps, labels).detach()) + self._taught(*seen, labels)
        gradients_g = learn(self.opt_g, loss_g)
        varied = [F.avg_pool2d(images, 8).std(dim=0).mean() for images in (fake.detach(), batch.real)]
        return (
            gradients_d,
            gradients_g,
            {
                "loss_d": loss_d.detach(),
                "loss_g": loss_g.detach(),
                "acc_real": (real_logits > 0).double().mean(),
                "acc_fake": (fake_logits < 0).double().mean(),
                "grad_d": math.sqrt(sum(item.square().sum() for item in gradients_d)),
                "grad_g": math.sqrt(sum(item.square().sum() for item in gradients_g)),
                "diversity": varied[0] / (varied[1] + 1e-6),
            },
        )

    def _taught(self, real, fake, labels):
        """What frozen features of what D sees ask of G besides."""
        if not (self.config.perceptual or self.config.grading):
            return 0.0
        if isinstance(self.critic, Projected):
            maps = self.critic.look(real)[1:], self.critic.look(fake)[1:]
        else:
            maps = (Teacher().maps(images, range(4)) for images in (real, fake))
        real, fake = ([means_and_deviations(item) for item in each] for each in maps)
        taught = self.config.perceptual * sum(energy_distance(a, b, labels) for a, b in zip(real, fake, strict=True))
        if self.config.grading:
            taught = taught + self.config.grading * lacking_clarity(self.graders[0], self.opt_c, real, fake, labels)
        return taught


# -- the two side by side


def patches():
    """Real ones, a colour for each label."""
    return torch.tanh(torch.eye(CLASSES, 3)[LABELS, :, None, None] + 0.5 * torch.randn(4, 3, SIDE, SIDE))


def make_step(critic, settings):
    """A GanStep and the same by hand."""
    torch.manual_seed(0)
    plain = {"label_smoothing": 0.0, "penalty_every": EVERY, "lr_g": 3e-3, "lr_d": 1e-3, "betas": [0.3, 0.9]}
    config = TrainConfig("", "label", **plain | settings)
    step = GanStep(Painter(), critic(), config, num_classes=CLASSES)
    if config.grading:  # tells real patches apart to begin with: at 0, where it starts, it would ask for nothing
        features = torch.cat([means_and_deviations(item) for item in Teacher().maps(patches(), range(4))], dim=1)
        kinds = torch.stack([features[kind == LABELS].mean(dim=0) for kind in range(CLASSES)])
        step.graders[0].linear.weight.data = kinds - kinds.mean(dim=0)
    return step, ByHand(step, config)


ALL = {"r1": 0.7, "r2": 0.4, "gradient_penalty": 5.0, "perceptual": 3.0, "grading": 2.0, "adaptive": ["color"]}


@pytest.mark.parametrize(
    ("settings", "strength", "critic", "parts"),
    [
        *(pytest.param({"objective": name}, 0.0, Critic, 1, id=name) for name in PAPERS),
        pytest.param({"label_smoothing": 0.2}, 0.0, Critic, 1, id="label smoothing"),
        pytest.param({"r1": 0.7}, 0.0, Critic, 1, id="R1"),
        pytest.param({"objective": "relativistic", "r2": 0.4}, 0.0, Critic, 1, id="R2"),
        pytest.param({"objective": "wgan", "gradient_penalty": 5.0}, 0.0, Critic, 1, id="WGAN-GP"),
        pytest.param({"adaptive": ["color"]}, 0.3, Critic, 1, id="augmentation that happens"),
        pytest.param({"adaptive": ["color"]}, 0.2, Critic, 1, id="augmentation that does not happen"),
        pytest.param({"perceptual": 3.0}, 0.0, Critic, 1, id="feature matching"),
        pytest.param({"perceptual": 3.0}, 0.0, Projected, 1, id="feature matching on the features of D"),
        pytest.param({"grading": 2.0}, 0.0, Critic, 1, id="grading"),
        pytest.param(ALL | {"objective": "hinge"}, 0.3, Critic, 1, id="everything"),
        pytest.param(ALL | {"objective": "relativistic"}, 0.3, Critic, 2, id="everything in two parts"),
    ],
)
def test_two_steps_are_those_of_the_papers_by_hand(settings, strength, critic, parts, double, monkeypatch):
    # All that a step draws is 0.25: whether an image is augmented, how, and the share of fake in WGAN-GP's mixtures.
    chance = torch.tensor(0.25, dtype=torch.float64)
    monkeypatch.setattr(
        Rows, "rand", lambda rows, *shape, **_: chance.expand(len(range(rows.first, rows.total, rows.stride)), *shape)
    )
    monkeypatch.setattr(step_module, "Lite0", Teacher)
    step, by_hand = make_step(critic, settings)
    step.parts = parts
    for number, penalise in enumerate((True, False)):
        batch = Batch(patches(), LABELS, torch.randn(4, LATENT), seed=number, strength=strength)
        statistics = dict(zip(STATISTICS, step(batch, RATE, penalise), strict=True))
        gradients_d, gradients_g, expected = by_hand(batch, penalise)
        for found, wanted in ((step.discriminator, gradients_d), (step.generator, gradients_g)):
            assert same([parameter.grad for parameter in found.parameters()], wanted)
        for found, wanted in ((step.discriminator, by_hand.critic), (step.generator, by_hand.painter)):
            assert same(list(found.parameters()), list(wanted.parameters())), "updated weights"
        counted = step.config.objective in ("non_saturating", "hinge")  # how the others count what D gets right is not held here
        for name in STATISTICS if counted else set(STATISTICS) - {"acc_real", "acc_fake"}:
            assert float(statistics[name]) == pytest.approx(float(expected[name]), rel=1e-8), name


def same(found, wanted):
    return all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(found, wanted, strict=True))


# -- what a run hands to its steps, and what it makes of them


def make_run(**settings):
    """A run of a narrow DCGAN."""
    model = replace(dcgan_config(64, CLASSES), latent_dim=LATENT, g_channels=(4, 4, 4, 4), d_channels=(4, 4, 4, 4))
    config = TrainConfig("", "label", **{"batch_size": 4} | settings)
    return Trainer(model, config, list("abc"), [9, 9, 9], 100, torch.device("cpu"))


def handed(run, steps, **statistics):
    """What the next steps are handed, and the learning rates of G and D at that time. They do nothing but move G's weights by 1."""
    found = []

    def perform(work, batch, penalise):
        rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in (run.step.opt_g, run.step.opt_d)]
        found.append(SimpleNamespace(batch=batch, penalise=penalise, rates=rates))
        with torch.no_grad():
            torch._foreach_add_(list(run.step.generator.parameters()), 1.0)
        return torch.tensor([statistics.get(name, 0.5) for name in STATISTICS])

    run.step.perform = perform
    for _ in range(steps):
        run.train_on(torch.zeros(4, 3, 64, 64), LABELS)
    return found


def test_each_step_draws_other_latents_and_a_resumed_one_the_same_as_before():
    first, second = (step.batch for step in handed(make_run(), 2))
    assert first.z.shape == (4, LATENT) and not torch.equal(first.z, second.z)
    assert not torch.equal(first.z, handed(make_run(seed=1), 1)[0].batch.z)
    again = make_run()
    again.images = 4
    assert torch.equal(second.z, handed(again, 1)[0].batch.z)


@pytest.mark.parametrize("penalty", ["r1", "r2", "gradient_penalty"])
def test_penalties_are_taken_every_so_many_steps(penalty):
    steps = handed(make_run(penalty_every=3, **{penalty: 1.0}), 7)
    assert [step.penalise for step in steps] == [True, False, False, True, False, False, True]
    assert not any(step.penalise for step in handed(make_run(), 3)), "there are none"


def test_both_learning_rates_warm_up():
    steps = handed(make_run(lr_g=8e-3, lr_d=2e-3, warmup_images=10), 4)
    for step, factor in zip(steps, (0.1, 0.5, 0.9, 1.0), strict=True):
        assert step.rates == pytest.approx([8e-3 * factor, 2e-3 * factor])


# objective, acc_real, acc_fake -> whether the augmentation becomes stronger; pairs are easier to put in order
STRENGTHENED = [
    ("non_saturating", 0.95, 0.0, 1),
    ("non_saturating", 0.5, 1.0, -1),
    ("hinge", 0.85, 0.0, 1),
    ("relativistic", 0.9, 0.9, -1),
    ("relativistic", 0.95, 0.95, 1),
    ("wgan", 0.85, 0.85, -1),
]


@pytest.mark.parametrize(("objective", "acc_real", "acc_fake", "direction"), STRENGTHENED)
def test_augmentation_follows_what_d_says_of_real_patches_and_reaches_the_next_step(objective, acc_real, acc_fake, direction):
    run = make_run(adaptive=["color"], objective=objective)
    run.strength = 0.3
    steps = handed(run, ADAPT_STEPS + 1, acc_real=acc_real, acc_fake=acc_fake)
    expected = 0.3 + direction * 4 * ADAPT_STEPS / ADAPT_IMAGES
    assert [step.batch.strength for step in steps] == [0.3] * ADAPT_STEPS + [pytest.approx(expected)]


# half-life: that of the settings, and while the run is young a twentieth of the images seen
@pytest.mark.parametrize(("images", "half_life"), [(1000, 8.0), (36, 2.0)])
def test_the_average_moves_towards_the_generator_by_its_half_life(images, half_life):
    run = make_run(ema_half_life=8.0)
    run.images = images
    before = [parameter.clone() for parameter in run.ema.parameters()]
    handed(run, 1)
    kept = 0.5 ** (4 / half_life)
    for average, old, new in zip(run.ema.parameters(), before, run.step.generator.parameters(), strict=True):
        torch.testing.assert_close(average, kept * old + (1 - kept) * new)


def test_the_learning_rate_falls_over_the_whole_run():
    run = make_run(lr_decay="cosine", epochs=2, lr_g=8e-3, lr_d=2e-3, warmup_images=0)
    run.images = 100  # of 200
    assert handed(run, 1)[0].rates == pytest.approx([4e-3, 1e-3])


def test_slowing_down_halves_both_learning_rates_and_is_kept():
    run = make_run(lr_g=8e-3, lr_d=2e-3, warmup_images=0)
    run.slow_down()
    assert handed(run, 1)[0].rates == pytest.approx([4e-3, 1e-3])
    assert (run.state()["config"]["lr_g"], run.state()["config"]["lr_d"]) == (4e-3, 1e-3)


def test_the_seed_decides_the_weights_that_a_run_begins_with():
    first, again, other = (torch.cat([p.flatten() for p in make_run(seed=s).step.generator.parameters()]) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_share_of_patches_taken_for_real_is_by_their_own_labels():
    run, images = make_run(), torch.zeros(10, 3, 64, 64)

    class Judge(nn.Module):
        def forward(self, images, labels):
            return images[:, 0, 0, 0] + labels - 1.5  # above 0 where light, or of class 2

    run.step.discriminator = Judge()
    images[[0, 1, 5, 9]] = 5.0
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])
    assert run.share_judged_real(images, labels) == pytest.approx(0.6)


@pytest.mark.parametrize("objective", RELATIVE)
def test_where_only_differences_count_patches_are_held_against_generated_images_of_their_label(objective):
    run, images = make_run(objective=objective), torch.zeros(10, 3, 64, 64)

    class Judge(nn.Module):
        def forward(self, images, labels):
            return images[:, 0, 0, 0] + 100.0 * labels  # a level for each label

    class Paint(nn.Module):
        def forward(self, z, labels):
            assert z.shape == (len(labels), run.model.latent_dim)
            return torch.full((len(labels), 3, 64, 64), 1.0) * labels[:, None, None, None]

    run.step.discriminator, run.step.generator = Judge(), Paint()
    images[[0, 5, 9]], images[[6, 8]] = 5.0, 1.5  # above the generated 0, 1, 2 of their labels: 0, 5, 9 and 6
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])
    assert run.share_judged_real(images, labels) == pytest.approx(0.4)


# -- what a run keeps, and what it goes on with


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("network", ["generator", "discriminator", "ema"])
def test_no_network_with_a_weight_that_is_no_number_is_kept(network, value):
    state = {name: {"weight": torch.zeros(3), "steps": torch.tensor(7)} for name in ("generator", "discriminator", "ema")}
    check_finite(state)
    state[network]["weight"][1] = value
    with pytest.raises(DivergedError, match=f"{network} weight"):
        check_finite(state)


def test_a_checkpoint_holds_the_best_score_and_what_the_augmentation_follows(tmp_path):
    run, again = make_run(adaptive=["color"]), make_run(adaptive=["color"])
    handed(run, 3, acc_real=0.9)
    run.best_kid, run.strength = 0.125, 0.25
    checkpoint.save(tmp_path / "latest.pt", run.state())
    assert again.best_kid == math.inf
    again.restore(checkpoint.load(tmp_path / "latest.pt"))
    assert (again.best_kid, again.strength, again.images) == (0.125, 0.25, 12)
    assert torch.stack(again._verdicts).tolist() == pytest.approx([0.9] * 3)


def test_a_checkpoint_holds_each_network_under_its_own_name():
    run, again = make_run(), make_run(seed=1)
    handed(run, 2)
    state = run.state()
    again.restore(state)
    for name, network in (("generator", again.step.generator), ("discriminator", again.step.discriminator), ("ema", again.ema)):
        own = {"generator": run.step.generator, "discriminator": run.step.discriminator, "ema": run.ema}[name]
        assert all(torch.equal(value, own.state_dict()[key]) for key, value in network.state_dict().items()), name
    assert not all(torch.equal(a, b) for a, b in zip(again.ema.parameters(), again.step.generator.parameters(), strict=True))


def test_looking_at_the_average_leaves_the_generator_in_training():
    run = make_run()
    before = copy.deepcopy(run.step.generator.state_dict())
    run.sampler()
    assert run.step.generator.training and all(torch.equal(a, before[name]) for name, a in run.step.generator.state_dict().items())


def test_bare_weights_are_those_of_the_average_too():
    run, other = make_run(), make_run(seed=1).step
    run.restore_legacy(other.generator.state_dict(), other.discriminator.state_dict())
    for network, taken in (
        (run.step.generator, other.generator),
        (run.ema, other.generator),
        (run.step.discriminator, other.discriminator),
    ):
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), taken.parameters(), strict=True))


def test_a_resumed_run_keeps_its_settings_and_takes_the_typed_ones():
    habits = {"save_every": 2, "sample_every": 3, "eval_every": 0, "precision": "bfloat16", "auto_batch": True}
    before = TrainConfig("x", "label", augmentation={"flips": 0.5, "noise": 2.0}, r1=0.3, lr_g=1e-3, **habits)
    state = {"config": before.to_dict(), "model": dcgan_config(64, CLASSES).to_dict()}

    def resumed(*flags):
        return resume.merged_config(options.make_parser("").parse_args(["--patches", "x", *flags]), state, {})

    assert resumed() == before
    changed = resumed("--flips", "0.25", "--elastic", "1.5", "--lr_g", "0.004")
    assert changed == replace(before, augmentation={"flips": 0.25, "noise": 2.0, "elastic": 1.5}, lr_g=4e-3)
    changed = resumed("--eval_every", "5", "--precision", "float32", "--no-auto_batch")
    assert changed == replace(before, eval_every=5, precision="float32", auto_batch=False)
    with pytest.raises(UserError, match="--label_smoothing belongs to"):
        resumed("--objective", "hinge", "--label_smoothing", "0.2")


def test_another_objective_brings_its_penalties_except_for_typed_ones():
    model = improved_config(64, CLASSES)
    state = {"config": TrainConfig("x", "label", objective="hinge", r1=0.3).to_dict(), "model": model.to_dict()}
    flags = ["--patches", "x", "--objective", "wgan"]
    plain, typed = (
        resume.merged_config(options.make_parser("").parse_args([*flags, *more]), state, {})
        for more in ([], ["--gradient_penalty", "3"])
    )
    assert plain.objective == "wgan" and plain.gradient_penalty not in (0.0, 3.0) and plain.r1 == 0.0
    assert typed == replace(plain, gradient_penalty=3.0)


def test_the_size_of_a_run_is_that_of_the_images_that_come_out():
    model = improved_config(128, CLASSES, reduced_to=64)
    state = {"config": TrainConfig("x", "label").to_dict(), "model": model.to_dict()}

    def resumed(size):
        return resume.merged_config(options.make_parser("").parse_args(["--patches", "x", "--image_size", size]), state, {})

    assert resumed("64") == TrainConfig("x", "label")
    with pytest.raises(UserError, match="contradicts the checkpoint's 64"):
        resumed("128")


@pytest.fixture
def make_patches(tmp_path):
    """A dataset of dark patches of the training split and, where asked for, light ones of the test split."""

    def make(splits):
        rows = []
        for number, split in enumerate(splits):
            label = ("benign", "gleason3")[number % 2]
            path = tmp_path / label / f"s{number}_0_0.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), 200 if split == "test" else 50, np.uint8)).save(path)
            rows.append(Patch(f"{label}/{path.name}", f"s{number}", "radboud", 4, "4+4", label, 0, 0, 0, 0.5, 0.9, 50.0, split))
        write_manifest(tmp_path, rows)
        return PatchDataset(tmp_path, 64, "label")

    return make


def held_out_patches(dataset, scored):
    return importlib.import_module("train").held_out_patches(dataset, make_run(), scored)


@pytest.mark.parametrize("scored", [False, True])
def test_a_run_is_judged_by_the_test_split_where_there_is_one(make_patches, scored):
    held_out = held_out_patches(make_patches(["train"] * 4 + ["test"] * 3), scored)
    images, labels = held_out.unseen(8, 5)
    assert len(images) == 3 and (images > 0).all() and sorted(labels.tolist()) == [0, 0, 1]
    assert len(held_out.score.real) == 3 and (held_out.score.real == 200).all()


def test_training_patches_are_judged_as_they_are_and_the_same_held_out_ones_for_every_seed(make_patches, monkeypatch):
    dataset = make_patches(["train"] * 4 + ["test"] * 9)
    dataset.augmentation = Augmentation(noise=20.0)
    images, labels = held_out_patches(dataset, True).trained_on(3, 7)
    assert torch.allclose(images, torch.full((3, 3, 64, 64), 50 / 127.5 - 1)) and len(labels) == 3
    assert dataset.augmentation.noise == 20.0
    monkeypatch.setattr("train.COUNT", 4)
    others = [importlib.import_module("train").held_out_patches(dataset, make_run(seed=seed), True) for seed in range(5)]
    draws = [held_out.unseen(4, 800)[1].tolist() for held_out in others]
    assert all(labels == draws[0] for labels in draws)
    assert all((held_out.score.real == others[0].score.real).all() for held_out in others)


def test_without_a_test_split_scores_are_against_training_patches_which_are_never_called_unseen(make_patches):
    dataset = make_patches(["train"] * 4)
    assert held_out_patches(dataset, False) is None
    held_out = held_out_patches(dataset, True)
    assert held_out.unseen is None and (held_out.score.real == 50).all()
