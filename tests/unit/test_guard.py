"""Full disks, numbers that are none, workers that die, patches that go bad: a run survives or says what to do."""

import errno
import math
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from data import dataset as dataset_module
from data.dataset import PatchDataset
from data.order import BalancedOrder, BatchesFrom
from models.config import dcgan_config
from tests.conftest import write_noise_patches
from training import checkpoint, guard
from training.config import TrainConfig
from training.run import DeadWorkerError, Habits, Run, next_of
from training.runlog import RunLog, log_line, read_metrics
from training.signals import SignalRequests
from training.trainer import Trainer

BATCH, EPOCH = 4, 8


def make_run(folder, epochs=2, **settings):
    config = TrainConfig(patches="x", condition="none", epochs=epochs, batch_size=BATCH, **settings)
    trainer = Trainer(dcgan_config(64, 0), config, [], [], EPOCH, torch.device("cpu"))
    (folder / "checkpoints").mkdir(exist_ok=True)
    return Run(trainer, Habits(1, 0, 0, 2), folder / "checkpoints", RunLog(folder / "logs"), SignalRequests())


def batches(trainer, spoil=lambda images: False):
    """Noise that depends on the place on the clock alone; NaN where ``spoil`` says so."""
    for images in range(trainer.images, trainer.images_total, BATCH):
        real = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(images)).tanh()
        yield real * math.nan if spoil(images) else real, torch.zeros(BATCH, dtype=torch.long)


def test_nan_goes_back_once_with_half_the_learning_rates(tmp_path):
    run = make_run(tmp_path)
    rate, spoilt = run.trainer.config.lr_g, iter([False, False, False, True])  # in the second epoch, the first time only
    assert run.train(lambda: batches(run.trainer, lambda _: next(spoilt, False))) is None
    state = checkpoint.load(tmp_path / "checkpoints" / checkpoint.FINAL)
    guard.check_finite(state)
    assert state["config"]["lr_g"] == rate / 2
    assert state["progress"]["images"] == 2 * EPOCH
    assert f"going back to {EPOCH} images" in (tmp_path / "logs" / "train.log").read_text()


def test_nan_again_stops_with_a_diagnosis_and_a_whole_checkpoint(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="again after going back once"):
        run.train(lambda: batches(run.trainer, lambda images: images >= EPOCH))
    assert "Stopped by an error (a loss is not finite" in (tmp_path / "logs" / "report.html").read_text()
    state = checkpoint.load(tmp_path / "checkpoints" / checkpoint.LATEST)
    guard.check_finite(state)
    assert state["progress"]["images"] == EPOCH


def full_disk(times):
    """A stand-in for os.replace that meets a full disk ``times`` times."""
    left, replace = [times], os.replace

    def stand_in(source, target):
        if left[0] > 0 and str(target).endswith("latest.pt"):
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(source, target)

    return stand_in


def test_a_full_disk_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS_BETWEEN_TRIES", 0.01)
    run = make_run(tmp_path, epochs=1)
    monkeypatch.setattr(os, "replace", full_disk(3))
    assert run.train(lambda: batches(run.trainer)) is None
    assert (tmp_path / "logs" / "train.log").read_text().count("the disk is full") == 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that holds about two checkpoints more than a run needs."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", place]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(folder):
    """Leave no byte free."""
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20 if shutil.disk_usage(folder).free > 2**20 else 512))


def test_training_on_a_disk_that_is_really_full_waits_and_goes_on(small_disk, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS_BETWEEN_TRIES", 0.01)
    run, waits = make_run(small_disk), []
    line = run.log.line

    def somebody_frees_space(text):
        line(text)
        if "the disk is full" in text:
            waits.append(text)
            if len(waits) == 2:
                (small_disk / "filler").unlink()

    monkeypatch.setattr(run.log, "line", somebody_frees_space)
    assert run.train(lambda: batches(run.trainer, lambda images: bool(images == BATCH and fill(small_disk)))) is None
    assert len(waits) >= 2 and read_metrics(small_disk / "logs" / "metrics.jsonl")[0]
    assert checkpoint.load(small_disk / "checkpoints" / checkpoint.FINAL)["progress"]["images"] == 2 * EPOCH


def test_no_half_line_stays_where_the_disk_became_full(small_disk):
    log = RunLog(small_disk / "logs")
    for images in range(40):
        log.metrics({"loss_d": 0.123456789, "words": 300 * "w"}, images)
        if images == 4:
            fill(small_disk)  # what is left of the file's last block takes a few lines more, and a part of one
    (small_disk / "filler").unlink()
    log.metrics({"loss_d": 0.5}, 40)
    rows, torn = read_metrics(small_disk / "logs" / "metrics.jsonl")
    assert rows[-1]["images"] == 40 and 5 < len(rows) < 41 and not torn


def test_training_on_a_disk_that_stays_full_keeps_its_checkpoint(small_disk, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(guard, "TRIES", 2)
    run = make_run(small_disk)
    with pytest.raises(UserError, match="free some space there"):
        run.train(lambda: batches(run.trainer, lambda images: bool(images == EPOCH and fill(small_disk))))
    assert checkpoint.load(small_disk / "checkpoints" / checkpoint.LATEST)["progress"]["images"] == EPOCH


def test_a_disk_that_stays_full_ends_the_run_with_the_last_checkpoint_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(guard, "TRIES", 2)
    run = make_run(tmp_path)

    def then_full():
        yield from batches(run.trainer, lambda images: bool(images == EPOCH and monkeypatch.setattr(os, "replace", full_disk(99))))

    with pytest.raises(UserError, match=r"free some space there .* the last whole checkpoint is"):
        run.train(then_full)
    assert "Stopped by an error (the disk that holds" in (tmp_path / "logs" / "report.html").read_text()
    assert checkpoint.load(tmp_path / "checkpoints" / checkpoint.LATEST)["progress"]["images"] == EPOCH
    assert not list((tmp_path / "checkpoints").glob(".*.tmp"))


def test_waiting_for_space_ends_when_asked_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", full_disk(99))
    with pytest.raises(UserError, match="no checkpoint was written yet"):
        guard.save_patiently(tmp_path / "latest.pt", {}, 2, print, lambda: True)


def test_other_errors_of_the_disk_are_not_waited_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        guard.save_patiently(tmp_path / "gone" / "latest.pt", {}, 2, print, lambda: False)


def test_numbered_checkpoints_make_room_down_to_keep(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS_BETWEEN_TRIES", 0.0)
    for epoch in range(5):
        checkpoint.save(checkpoint.numbered(tmp_path, epoch), {"a": 1})
    monkeypatch.setattr(os, "replace", full_disk(1))
    guard.save_patiently(tmp_path / "latest.pt", {"a": 1}, 2, print, lambda: False)
    assert sorted(path.name for path in tmp_path.glob("epoch_*")) == ["epoch_0003.pt", "epoch_0004.pt"]


def test_the_time_left_is_by_the_clock_on_the_wall_and_of_the_resolution_at_hand(tmp_path, monkeypatch):
    run, now = make_run(tmp_path), [100.0]
    monkeypatch.setattr("training.run.time.monotonic", lambda: now[0])
    run._begin_pace()

    def speed(seconds, images, resolution=64):
        now[0] += seconds
        run.trainer = SimpleNamespace(images=images, resolution=resolution)
        return run._images_per_second()

    assert speed(20, 200) == 10 and speed(60, 400) == 5  # held up, by a score or by another program: not forgotten at once
    assert speed(10, 450, 128) == 5 and speed(10, 500, 128) == 5 and speed(10, 530, 128) == 4


def test_patches_at_hand_are_not_waited_for(tmp_path):
    class AtHand:
        on_device = True

        def __iter__(self):
            return batches(run.trainer)

    run = make_run(tmp_path, epochs=1)
    assert run.train(AtHand) is None
    assert read_metrics(tmp_path / "logs" / "metrics.jsonl")[0][-1]["wait"] == 0


def test_a_full_gpu_says_which_option_to_lower(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.setattr(run.trainer, "train_on", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(UserError, match=f"--batch_size {BATCH}.*--auto_batch"):
        run.train(lambda: batches(run.trainer))


def test_auto_batch_goes_on_in_parts(tmp_path, monkeypatch):
    run = make_run(tmp_path, epochs=1)
    run.habits = replace(run.habits, auto_batch=True)
    generator, small_enough = run.trainer.step.generator, BATCH // 2
    forward = generator.forward

    def short_of_memory(z, labels=None):
        if len(z) > small_enough:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(z, labels)

    monkeypatch.setattr(generator, "forward", short_of_memory)
    assert run.train(lambda: batches(run.trainer)) is None
    assert run.trainer.step.parts == 2
    assert "each batch of 4 in 2 parts" in (tmp_path / "logs" / "train.log").read_text()
    small_enough = 1
    with pytest.raises(UserError, match="even in 2 parts"):
        make_again = make_run(tmp_path, epochs=1)
        make_again.habits = run.habits
        monkeypatch.setattr(make_again.trainer.step.generator, "forward", short_of_memory)
        make_again.train(lambda: batches(make_again.trainer))


def test_errors_that_are_no_dead_worker_are_raised(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.setattr(run.trainer, "train_on", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run.train(lambda: batches(run.trainer))


@pytest.fixture
def patches(tmp_path):
    return write_noise_patches(tmp_path / "patches", 40)


class Deadly(PatchDataset):
    """Its first worker to reach patch 3 is killed."""

    def __getitem__(self, draw):
        mark = self.folder.parent / "killed"
        if draw.index == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(draw)


def load(data, trainer, workers):
    order = BalancedOrder(data.groups(), 0)
    return DataLoader(data, batch_sampler=BatchesFrom(order, BATCH, trainer.images, trainer.images_total), num_workers=workers)


def test_a_killed_data_worker_changes_nothing(tmp_path, patches):
    finals = []
    for data, workers, folder in ((PatchDataset(patches, 64), 0, "a"), (Deadly(patches, 64), 1, "b")):
        (tmp_path / folder).mkdir()
        run = make_run(tmp_path / folder, epochs=6)
        assert run.train(partial(load, data, run.trainer, workers)) is None
        finals.append(checkpoint.load(tmp_path / folder / "checkpoints" / checkpoint.FINAL)["generator"])
    assert (tmp_path / "killed").exists()
    assert "a data worker died (1 of" in (tmp_path / "b" / "logs" / "train.log").read_text()
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


class Faulty(Dataset):
    """Patches that raise an error of one kind."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.kind("a bug")


def broken(error):
    """Batches that end before the first."""
    raise error
    yield


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), EOFError(), RuntimeError("DataLoader worker (pid 7) exited unexpectedly")]
)
def test_every_sign_of_a_dead_worker_is_understood(error):
    with pytest.raises(DeadWorkerError):
        next_of(broken(error))


@pytest.mark.parametrize("kind", [RuntimeError, FileNotFoundError])
def test_an_error_in_a_living_worker_is_not_taken_for_its_death(kind):
    batches = iter(DataLoader(Faulty(kind), num_workers=1))
    with pytest.raises(kind, match="a bug"):
        next_of(batches)
    batches._shutdown_workers()  # the exception holds on to them, and waits five seconds when it is let go


def test_no_signal_of_a_dead_worker_can_tear_a_step(tmp_path, patches):
    run, handlers = make_run(tmp_path), []
    step = run.trainer.train_on
    run.trainer.train_on = lambda *batch: handlers.append(signal.getsignal(signal.SIGCHLD)) or step(*batch)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # as PyTorch's
    assert run.train(partial(load, PatchDataset(patches, 64), run.trainer, 1)) is None
    assert set(handlers) == {signal.SIG_DFL}


def test_workers_write_to_the_run_s_log_that_a_patch_went_bad(tmp_path, patches, monkeypatch):
    monkeypatch.setattr(dataset_module, "MAX_CACHE_BYTES", 0)
    data = PatchDataset(patches, 64, "label")
    data.report = partial(log_line, tmp_path)
    (patches / data.files[0].path).unlink()
    assert len(list(DataLoader(data, BATCH, num_workers=1))) == 10
    assert (tmp_path / "train.log").read_text().count("went bad during training and is skipped") == 1


def test_patches_that_go_bad_are_skipped_until_they_are_many(patches, monkeypatch, capsys):
    monkeypatch.setattr(dataset_module, "MAX_CACHE_BYTES", 0)
    data = PatchDataset(patches, 64, "label")
    (patches / data.files[0].path).unlink()
    (patches / data.files[1].path).write_bytes(b"no image")
    for _ in range(2):
        assert np.array_equal(data.pixels(0), data.pixels(2))
    assert data.label(0) == data.label(2)
    assert capsys.readouterr().out.count("went bad") == 2
    (patches / data.files[5].path).unlink()
    with pytest.raises(UserError, match="3 of 40 patches .* can no longer be read"):
        data.pixels(5)
