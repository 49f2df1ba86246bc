"""Recorded steps do what steps do. Without a GPU a stand-in repeats the step's Python where a recording repeats its kernels."""

from dataclasses import replace

import pytest
import torch

from models.config import dcgan_config, improved_config
from training import recording
from training.config import TrainConfig
from training.presets import training_defaults
from training.recording import Recorder
from training.step import STATISTICS, directly
from training.trainer import Trainer

BATCH = 4


class Repeating:
    """A stream that repeats the work with what it was recorded with."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def run(self, work):
        return work()

    def record(self, work):
        self.recorded += 1
        result = torch.zeros(len(STATISTICS))

        def replay():
            self.replayed += 1
            result.copy_(work())

        return replay, result


def make(model, device="cpu", **settings):
    name = "dcgan" if model == "dcgan" else "improved"
    networks = dcgan_config(64, 2)
    if name == "improved":
        networks = improved_config(64, 2, discriminator=model, grow_from=16, window=32, layer_noise=True)
        narrow = (8, 8) if model == "projected" else (8,) * len(networks.d_channels)
        networks = replace(networks, g_channels=(8,) * len(networks.g_channels), d_channels=narrow)
    values = training_defaults(name, None) | {"grow_images": 24, "batch_size": BATCH, "warmup_images": 40, "lr_decay": "late"}
    values |= {"lr_g": 1e-4, "lr_d": 1e-4}  # larger steps make rounding large
    trainer = Trainer(networks, TrainConfig("", "label", **values | settings), ["a", "b"], [8, 8], 16, torch.device(device))
    trainer.strength = 0.3 if settings.get("adaptive", values.get("adaptive")) else 0.0
    return trainer


def trained(trainer, steps, recorder):
    if recorder:
        trainer.step.perform = recorder
    images = torch.Generator().manual_seed(1)
    numbers = []
    for _ in range(steps):
        real = torch.rand(BATCH, 3, 64, 64, generator=images) * 2 - 1
        numbers.append(trainer.train_on(real, torch.arange(BATCH) % 2))
    return torch.stack(numbers).cpu()


def same(a, b, close):
    for one, other in zip(a.ema.parameters(), b.ema.parameters(), strict=True):
        close(one.cpu(), other.cpu())
    for one, other in zip(a.step.discriminator.parameters(), b.step.discriminator.parameters(), strict=True):
        close(one.cpu(), other.cpu())


@pytest.mark.parametrize(
    "model, settings",
    [
        ("residual", {"epochs": 20, "perceptual": 0.0}),
        ("residual", {"epochs": 3, "perceptual": 0.0, "adaptive": []}),
        ("projected", {"epochs": 30, "grading": 1.0}),
        ("dcgan", {"epochs": 20}),
    ],
)
def test_recorded_steps_are_the_same_steps(model, settings):
    stream = Repeating()
    direct, recorded = make(model, **settings), make(model, **settings)
    steps = 26 if model == "residual" else 12
    numbers = trained(direct, steps, None), trained(recorded, steps, Recorder(stream))
    assert stream.recorded >= (1 if model == "dcgan" else 2) and stream.replayed > steps // 3
    # To rounding: how far a resolution has faded in is a number for the one and a tensor for the other.
    torch.testing.assert_close(*numbers, rtol=1e-3, atol=1e-3)
    same(direct, recorded, lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3))


def test_old_recordings_make_room(monkeypatch):
    monkeypatch.setattr(recording, "MOST", 2)
    stream = Repeating()
    recorder = Recorder(stream)
    trained(make("residual", perceptual=0.0, penalty_every=2), 26, recorder)
    assert len(recorder._recordings) == 2 and stream.recorded > 2


def test_a_step_that_cannot_be_recorded_is_done_all_the_same(capsys):
    class Refusing(Repeating):
        def record(self, work):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    direct, refused = make("dcgan"), make("dcgan")
    assert torch.equal(trained(direct, 6, None), trained(refused, 6, Recorder(Refusing())))
    assert capsys.readouterr().out.count("cannot be recorded on this GPU (operation not permitted)") == 1


def test_full_memory_while_recording_is_no_refusal():
    class Full(Repeating):
        def record(self, work):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        trained(make("dcgan"), 6, Recorder(Full()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording needs a GPU")
@pytest.mark.parametrize("model", ["residual", "projected", "dcgan"])
def test_recordings_on_a_gpu_are_the_same_steps(model):
    """With small rates: kernels that add up in no fixed order differ in rounding, and what is learned makes that large."""
    direct, recorded = (make(model, "cuda", epochs=30, lr_g=1e-7, lr_d=1e-7) for _ in range(2))
    direct.step.perform = directly
    assert isinstance(recorded.step.perform, Recorder)
    numbers = trained(direct, 12, None), trained(recorded, 12, None)
    torch.testing.assert_close(*numbers, rtol=0.05, atol=0.05)
    assert recorded.step.perform._recordings and not recorded.step.perform._refused
