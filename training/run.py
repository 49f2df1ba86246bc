"""The loop: steps, log lines, pictures, scores, checkpoints, and what to do when something goes wrong."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from models.layers import GROUP
from training import checkpoint
from training.config import TrainConfig
from training.device import describe, peak_memory_mb
from training.guard import DivergedError, check_finite, save_patiently
from training.presets import settings_of
from training.report import REPORT, Facts, write_run_report
from training.runlog import RunLog, duration
from training.signals import SignalRequests, only_when_waiting
from training.step import STATISTICS
from training.trainer import Trainer

SECONDS_BETWEEN_LINES = 20.0
SECONDS_BETWEEN_SAVES = 900.0
LINES_OF_PACE = 30  # log lines that the time left is estimated by: ten minutes
REPORT_SHARE = 0.01  # of the time, at most: short runs write fewer reports
MAX_WORKER_DEATHS = 10
# Patches that D judges for a line, held-out and training ones each: fewest, most, and one for so many images of the interval, since
# to judge two costs a fifth of a step's time for an image: about one percent.
JUDGED, IMAGES_A_JUDGED = (8, 32), 24


class DeadWorkerError(Exception):
    """A process that prepares batches is gone."""


@dataclass(frozen=True)
class Habits:
    """How often a run saves, draws samples and scores them (epochs, 0 for never), and how many numbered checkpoints it keeps.

    eval_share: scoring before the end is left out while it has taken more than this share of the time, 0..1. auto_batch: whether
    batches are taken in parts when GPU memory is full.
    """

    save_every: int
    sample_every: int
    eval_every: int
    keep: int
    eval_share: float = 1.0
    auto_batch: bool = False

    @staticmethod
    def of(config: TrainConfig, folder: Path) -> Habits:
        """As the settings say; where they do not say how many numbered checkpoints stay, three, or as many as ``folder`` has."""
        eval_every, eval_share = (20, 0.05) if config.eval_every is None else (config.eval_every, 1.0)
        keep = config.keep or max(3, len(checkpoint.all_numbered(folder)))
        return Habits(config.save_every, config.sample_every, eval_every, keep, eval_share, config.auto_batch)


@dataclass(frozen=True)
class HeldOut:
    """What a run is judged by.

    unseen: draws (count, seed) images (N, 3, S, S) in [-1, 1] and labels (N,) that the networks never train on, at most as many, to
    see whether D learns by heart; None where there are none. trained_on: draws as many of the training patches, as they are and not
    augmented, to hold against them. score: draws images with the function it is handed and returns their metrics, "kid" and
    "scored_on" among them.
    """

    unseen: Callable[[int, int], tuple[Tensor, Tensor]] | None
    trained_on: Callable[[int, int], tuple[Tensor, Tensor]]
    score: Callable[[Callable[[int, int], tuple[np.ndarray, list[str]]]], dict[str, float | str]]


class Meter:
    """Averages between two log lines, kept on the device until they are asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Start a new interval."""
        self._sum = torch.zeros(len(STATISTICS), device=self.device)
        self._steps, self.images, self.waited, self._start = 0, 0, 0.0, time.monotonic()

    def add(self, statistics: Tensor, images: int, waited: float) -> None:
        """Count one step of ``images`` that waited ``waited`` seconds for its data."""
        self._sum += statistics
        self._steps += 1
        self.images += images
        self.waited += waited

    def leave_out(self, seconds: float) -> None:
        """Do not count time that went into pictures, checkpoints and scores: img_s is the speed of training."""
        self._start += seconds

    @property
    def seconds(self) -> float:
        """Length of the interval so far."""
        return time.monotonic() - self._start

    def read(self) -> dict[str, float]:
        """Mean statistics, images per second, and the share of time spent waiting for data."""
        means = (self._sum / max(self._steps, 1)).tolist()
        seconds = max(self.seconds, 1e-9)
        return dict(zip(STATISTICS, means, strict=True)) | {"img_s": self.images / seconds, "wait": self.waited / seconds}


class Run:
    """A trainer at work in its folders until its epochs are done or a signal asks it to leave."""

    def __init__(
        self, trainer: Trainer, habits: Habits, folder: Path, log: RunLog, requests: SignalRequests, held_out: HeldOut | None = None
    ):
        self.trainer, self.habits, self.folder, self.log, self.requests = trainer, habits, folder, log, requests
        self.held_out = held_out
        self._start, self._scoring, self._reporting = time.monotonic(), 0.0, 0.0
        self.meter = Meter(trainer.device)
        self._pace: deque[tuple[float, int, int]] = deque(maxlen=LINES_OF_PACE)  # (seconds, images, resolution) of the last lines
        self._begin_pace()
        self._last_save = time.monotonic()
        self._slowed, self._deaths = False, 0

    def train(self, batches_from_here: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> int | None:
        """Train to the end; return the signal that stopped it before, or None. The state is saved either way.

        batches_from_here: makes the batches from the trainer's place on the clock on. Losses or weights that are not finite lead
        back to the last good state once, with half the learning rates; data workers that die are replaced.
        """
        for network in (self.trainer.step.generator, self.trainer.step.discriminator, self.trainer.ema):
            self.trainer.processes.same_as_first(network)
        self._keep_other_latest()
        self._save_latest()  # a full or unwritable disk shows now and not in the night, and there is a state to go back to
        try:
            return self._through_trouble(batches_from_here)
        except Exception as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            self.write_report(f"Stopped by an error ({words[0]})")
            raise

    def _through_trouble(self, batches_from_here: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> int | None:
        while True:
            try:
                return self._to_the_end(batches_from_here())
            except DivergedError as problem:
                self._roll_back(problem)
            except torch.OutOfMemoryError as error:
                self._make_room(error)
            except DeadWorkerError as error:
                self._replace_workers(error)
            except UserError as error:  # from a data worker it comes with that process's traceback in front
                raise UserError(str(error).strip().splitlines()[-1].removeprefix("common.errors.UserError: ")) from error

    def _to_the_end(self, batches: Iterable[tuple[Tensor, Tensor]]) -> int | None:
        stopped = self.loop(batches)
        self.write_line()
        if stopped is None:
            self._finish()
        else:
            self._save_latest()
            self.log.line(f"stopped by {signal.Signals(stopped).name} after saving; go on with --resume")
            self.write_report(f"Stopped by {signal.Signals(stopped).name}")
        return stopped

    def _roll_back(self, problem: DivergedError) -> None:
        trainer, config, reached = self.trainer, self.trainer.config, self.trainer.images
        with suppress(DivergedError):
            self.write_line()  # the numbers that are none, for the log and the report
        if self._slowed:
            raise UserError(
                f"{problem}, at {reached} images and again after going back once with half the learning rates (now lr_g "
                f"{config.lr_g:g}, lr_d {config.lr_d:g}); see the losses in {self.log.folder / REPORT}, then go on with --resume "
                "and lower ones, or look for odd patches with check_data.py"
            )
        self._go_back()
        trainer.slow_down()
        self._slowed = True
        self.log.line(
            f"warning: {problem}, at {reached} images; going back to {trainer.images} images with half the learning rates: "
            f"lr_g {trainer.config.lr_g:g}, lr_d {trainer.config.lr_d:g}"
        )

    def _go_back(self) -> None:
        self.trainer.restore(checkpoint.load(self.folder / checkpoint.LATEST))
        self.log.rewind(self.trainer.images, self.trainer.epoch)
        self.meter.clear()

    def _make_room(self, error: torch.OutOfMemoryError) -> None:
        """Go on from the last checkpoint with batches in smaller parts where the habits say so, else raise UserError."""
        batch = self.trainer.config.batch_size
        if not self.habits.auto_batch or self.trainer.processes.world > 1:
            raise UserError(
                f"the GPU's memory is full at --batch_size {batch}; go on with --resume --auto_batch, which takes it in parts, or "
                "with a smaller one, or start anew with a smaller --image_size or --preset"
            ) from error
        if not self.trainer.divide():
            raise UserError(
                f"the GPU's memory is full at --batch_size {batch} even in {self.trainer.step.parts} parts; start anew with a "
                "smaller --image_size or --preset, or on a larger GPU"
            ) from error
        error.__traceback__ = None  # its frames hold the tensors that were too many
        for optimizer in (self.trainer.step.opt_g, self.trainer.step.opt_d):
            optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        self._go_back()
        self.log.line(
            f"warning: the GPU's memory is full; going on from {self.trainer.images} images with each batch of {batch} in "
            f"{self.trainer.step.parts} parts"
        )

    def _replace_workers(self, error: DeadWorkerError) -> None:
        """Go on from the last checkpoint after a data worker died (killed for want of memory, a crash in a decoder)."""
        if self.trainer.processes.world > 1:
            raise UserError(
                f"a data worker died ({error}); torchrun's --max-restarts starts all again from the last one"
            ) from error
        self._deaths += 1
        if self._deaths > MAX_WORKER_DEATHS:
            raise UserError(f"data workers died {self._deaths} times; free some memory, or train with --workers 0") from error
        self._go_back()
        self.log.line(
            f"warning: a data worker died ({self._deaths} of at most {MAX_WORKER_DEATHS}); new ones go on from the last "
            f"checkpoint, at {self.trainer.images} images"
        )

    def loop(self, batches: Iterable[tuple[Tensor, Tensor]]) -> int | None:
        """The steps alone, with what belongs between them."""
        trainer, at_hand = self.trainer, getattr(batches, "on_device", False)
        batches = iter(batches)
        self._begin_pace()
        only_when_waiting()
        while trainer.images < trainer.images_total:
            asked = time.monotonic()
            real, labels = next_of(batches)
            waited = 0.0 if at_hand else time.monotonic() - asked
            epochs_before, images_before = int(trainer.epoch), trainer.images
            statistics = trainer.train_on(real, labels)
            self.meter.add(statistics, trainer.images - images_before, waited)
            stop, line_due, save_due = trainer.processes.agree(
                (self.requests.stop or 0, self.meter.seconds >= SECONDS_BETWEEN_LINES, self._save_due())
            )
            if line_due:
                self.write_line()
            self._after_step(epochs_before, int(trainer.epoch), bool(save_due))
            if stop:
                return stop
        return None

    def _save_due(self) -> bool:
        return self.requests.save or time.monotonic() - self._last_save > SECONDS_BETWEEN_SAVES

    def _after_step(self, before: int, now: int, save_due: bool) -> None:
        """What is due after a step that led from ``before`` to ``now`` whole epochs."""
        if self.trainer.images >= self.trainer.images_total:
            return  # the end has its own picture and checkpoint
        start = time.monotonic()
        if crossed(before, now, self.habits.sample_every):
            self.draw_samples()
        if crossed(before, now, self.habits.eval_every) and self._scoring_share() <= self.habits.eval_share:
            self.score()
        due = crossed(before, now, self.habits.sample_every) or crossed(before, now, self.habits.eval_every)
        if due and self._reporting <= REPORT_SHARE * (time.monotonic() - self._start):
            self.write_report("Running")
        if crossed(before, now, self.habits.save_every):
            self._save_numbered()
        elif save_due:
            self._save_latest()
            self.log.line(f"saved {self.folder / checkpoint.LATEST}")
        self.meter.leave_out(time.monotonic() - start)

    def write_line(self) -> None:
        """One line of fixed fields to the log, the same numbers to metrics.jsonl."""
        if self.meter.images == 0:
            return
        trainer, means = self.trainer, self.meter.read()
        left = max(0, trainer.images_total - trainer.images) / max(self._images_per_second(), 1e-9)
        row = {"epoch": trainer.epoch, "res": trainer.resolution, "side": trainer.model.output_size} | means
        row |= self._judged() | {"augment": trainer.strength if trainer.config.adaptive else 0.0}
        row |= {"mem_mb": peak_memory_mb(trainer.device), "left_s": left}
        self.log.line(self._as_text(row))
        self.log.metrics({name: round(value, 6) for name, value in row.items()}, trainer.images)
        self.meter.clear()
        if not np.isfinite(means["loss_d"] + means["loss_g"]):
            raise DivergedError(f"a loss is not finite (loss_d {means['loss_d']:g}, loss_g {means['loss_g']:g})")

    def _begin_pace(self) -> None:
        self._pace.clear()
        self._pace.append((time.monotonic(), self.trainer.images, self.trainer.resolution))

    def _images_per_second(self) -> float:
        """Over the last lines at this resolution, by the clock on the wall: with scores, pictures, and what held the machine up."""
        now = (time.monotonic(), self.trainer.images, self.trainer.resolution)
        while len(self._pace) > 1 and self._pace[0][2] != now[2]:
            self._pace.popleft()
        start, images, _ = self._pace[0]
        self._pace.append(now)
        return (now[1] - images) / max(now[0] - start, 1e-9)

    def _judged(self) -> dict[str, float]:
        """Share of some held-out patches, others each time, that D takes for real, and of as many training patches.

        Judged alike: acc_real is of augmented patches, of windows as well, and of all labels alike, and so it is lower. {} where
        there are none.
        """
        trainer, held_out = self.trainer, self.held_out
        if held_out is None or held_out.unseen is None:
            return {}
        count = min(max(self.meter.images // IMAGES_A_JUDGED // GROUP * GROUP, JUDGED[0]), JUDGED[1])
        return {
            "acc_held_out": trainer.share_judged_real(*held_out.unseen(count, trainer.images)),
            "acc_trained": trainer.share_judged_real(*held_out.trained_on(count, trainer.images)),
        }

    def _as_text(self, row: dict[str, float]) -> str:
        numbers = " ".join(f"{name} {row[name]:.3f}" for name in (*STATISTICS, "acc_held_out", "acc_trained") if name in row)
        return (
            f"epoch {row['epoch']:.2f}/{self.trainer.config.epochs} images {self.trainer.images} res {row['res']} {numbers} "
            f"augment {row['augment']:.2f} img/s {row['img_s']:.1f} wait {100 * row['wait']:.1f}% mem {row['mem_mb']}MB "
            f"left {'over ' * self._growing}{duration(row['left_s'])}"
        )

    @property
    def _growing(self) -> bool:
        """Whether steps will take longer yet, nobody knows how much: until what is seen at once has its full size."""
        return self.trainer.resolution < self.trainer.model.seen

    def draw_samples(self) -> None:
        """samples/epoch_0020.png from the averaged generator."""
        trainer = self.trainer
        picture = trainer.sampler().grid(trainer.classes, trainer.config.seed)
        self.log.picture(f"epoch_{round(trainer.epoch):04d}.png", picture, trainer.images)

    def score(self) -> None:
        """KID and the like of the averaged generator; the best so far is kept as best.pt."""
        if self.held_out is None:
            return
        start = time.monotonic()
        scores = self.held_out.score(self.trainer.sampler().labelled)
        if not scores:
            return  # no weights to score by, as the function has said
        trainer, scored_on = self.trainer, scores["scored_on"]
        if trainer.best_scored_on not in ("", scored_on):
            self._begin_anew()
        best = scores["kid"] < trainer.best_kid
        if best:
            trainer.best_kid, trainer.best_scored_on = scores["kid"], scored_on
            state = self.trainer.state()
            check_finite(state)
            self._write_latest(state)
            self._keep_latest_as(self.folder / checkpoint.BEST)
        self._scoring += time.monotonic() - start
        shown = {name: value if isinstance(value, str) else f"{value:.4f}" for name, value in scores.items() if name != "scored_on"}
        text = " ".join(f"{name} {value}" for name, value in shown.items())
        note = ", the best so far" if best else ""
        self.log.line(
            f"epoch {self.trainer.epoch:.2f} scores {text}{note} (scoring takes {100 * self._scoring_share():.1f}% of the time)"
        )
        against = "training" if self.held_out.unseen is None else "held-out"
        model = self.trainer.model
        row = {"epoch": round(self.trainer.epoch, 6), "side": model.output_size, "model": model.model, "against": against}
        self.log.metrics(row | scores, self.trainer.images)

    def _begin_anew(self) -> None:
        """KIDs against other patches than before have nothing to beat; what was the best is kept under another name."""
        self.trainer.best_kid = math.inf
        kept = checkpoint.free_name(self.folder, "best_before")
        with suppress(FileNotFoundError):
            (self.folder / checkpoint.BEST).replace(kept)
        self.log.line(f"note: the held-out patches are not those of before, so KID begins anew; best.pt is now {kept.name}")

    def write_report(self, state: str) -> None:
        """report.html in the log folder; a failure costs the report and never the training."""
        start, trainer = time.monotonic(), self.trainer
        settings = settings_of(trainer)
        settings |= {"classes": ", ".join(trainer.classes) or "none", "patches an epoch": trainer.images_per_epoch}
        settings |= {"device": describe(trainer.device), "torch": torch.__version__}
        facts = Facts(state, trainer.images, trainer.images_total, trainer.epoch, trainer.config.epochs, settings, self._growing)
        try:
            write_run_report(self.log.folder, facts)
        except (OSError, UserError) as error:
            self.log.line(f"warning: {self.log.folder / REPORT} could not be written ({error}); training goes on")
        self._reporting += time.monotonic() - start

    def _scoring_share(self) -> float:
        return self._scoring / max(time.monotonic() - self._start, 1e-9)

    def _save_latest(self) -> None:
        state = self.trainer.state()
        check_finite(state)
        self._write_latest(state)
        self.requests.save = False
        self._last_save = time.monotonic()
        self.trainer.processes.wait()  # until it is there for all to go back to

    def _write_latest(self, state: dict) -> None:
        path, keep = self.folder / checkpoint.LATEST, self.habits.keep
        save_patiently(path, state, keep, self.log.line, lambda: self.requests.stop is not None)

    def _keep_latest_as(self, path: Path) -> None:
        checkpoint.keep_as(self.folder / checkpoint.LATEST, path)
        checkpoint.prune(self.folder, self.habits.keep)

    def _keep_other_latest(self) -> None:
        """Whoever goes back to an earlier checkpoint keeps what was reached."""
        trainer = self.trainer
        kept = checkpoint.keep_other_latest(self.folder, trainer.images, trainer.step.generator.state_dict())
        if kept:
            self.log.line(
                f"note: {checkpoint.LATEST} was of another state than this, at epoch {trainer.epoch:.2f}: it stays as {kept}, "
                "which no run writes over or removes"
            )

    def _save_numbered(self) -> None:
        self._save_latest()
        self._keep_latest_as(checkpoint.numbered(self.folder, round(self.trainer.epoch)))

    def _finish(self) -> None:
        self._save_latest()  # nothing of what comes now can cost the training
        self.draw_samples()
        if self.habits.eval_every:
            self.score()
        self._save_numbered()
        final = self.folder / checkpoint.FINAL
        self._keep_latest_as(final)
        self.log.line(f"done: {self.trainer.config.epochs} epochs, {self.trainer.images} images; the generator is in {final}")
        self.write_report("Done")


class Follower(Run):
    """The run in a process other than the first: the same steps and decisions, no files."""

    def draw_samples(self) -> None:
        """Left to the first process."""

    def score(self) -> None:
        """Left to the first process."""

    def write_report(self, state: str) -> None:
        """Left to the first process."""

    def _keep_other_latest(self) -> None:
        pass

    def _write_latest(self, state: dict) -> None:
        pass

    def _keep_latest_as(self, path: Path) -> None:
        pass


def next_of(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The next batch. Raises DeadWorkerError when the process that should give it is gone, not for an error in it.

    PyTorch says so in a RuntimeError; a batch that it had given before it died cannot be fetched from its memory any more either.
    """
    try:
        return next(batches)
    except (ConnectionError, EOFError, FileNotFoundError, RuntimeError) as error:
        of_the_worker = str(error).startswith("Caught ")  # as PyTorch passes on what was raised in a worker that is alive
        if of_the_worker or (isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error)):
            raise
        raise DeadWorkerError(str(error)) from error


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` epochs was reached between two counts; never when ``every`` is 0."""
    return every > 0 and before // every < after // every
