"""The loop: steps, averaged weights, log lines, pictures, checkpoints. Handed patches as (images, labels) batches."""

from __future__ import annotations

import copy
import math
import platform
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.pictures import grid
from common.seeding import derive_seed
from models import build
from models.augment import adapt
from models.config import ModelConfig
from models.ema import ema_decay, make_ema, update_ema
from training import checkpoint
from training.config import TrainConfig
from training.device import describe, peak_memory_mb
from training.guard import DivergedError, check_finite, save_patiently
from training.report import REPORT, Facts, write_run_report
from training.runlog import RunLog, duration
from training.sampling import Sampler, calibrate, latent, run_generator
from training.schedule import growth, learning_rate_factor
from training.signals import SignalRequests, only_when_waiting
from training.step import STATISTICS, GanStep

SECONDS_BETWEEN_LINES = 20.0
SECONDS_BETWEEN_SAVES = 900.0
REPORT_SHARE = 0.01  # of the time, at most: short runs write fewer reports
GRID_COLUMNS = 8
ADAPT_STEPS = 16
MAX_WORKER_DEATHS = 10


@dataclass(frozen=True)
class Habits:
    """How often a run saves, draws samples and scores them (epochs, 0 for never), and how many numbered checkpoints it keeps.

    eval_share: scoring before the end is left out while it has taken more than this share of the time, 0..1.
    """

    save_every: int
    sample_every: int
    eval_every: int
    keep: int
    eval_share: float = 1.0


@dataclass(frozen=True)
class HeldOut:
    """Patches the networks never train on: images (N, 3, S, S) in [-1, 1] and labels (N,), to see whether D learns by heart.

    score: draws images with the function it is handed and returns their metrics, "kid" among them.
    """

    images: Tensor
    labels: Tensor
    score: Callable[[Callable[[int, int], np.ndarray]], dict[str, float]]


class Trainer:
    """One run: its networks, its place on the clock (``images`` seen), its folder of checkpoints."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        classes: Sequence[str],
        class_counts: Sequence[int],
        images_per_epoch: int,
        device: torch.device,
    ):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        generator, discriminator = (network.to(device, memory_format=torch.channels_last) for network in build(model))
        self.model, self.config, self.device = model, config, device
        self.classes, self.class_counts = list(classes), list(class_counts)
        self.images_per_epoch, self.images = images_per_epoch, 0
        self.step = GanStep(generator, discriminator, config)
        self.ema = make_ema(generator)
        self.best_kid = math.inf
        self.strength = 0.0  # of the augmentation in front of D
        self._verdicts: list[Tensor] = []
        self._calibrated_at: int | None = None

    # -- state

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""
        return self.images / self.images_per_epoch

    @property
    def resolution(self) -> int:
        """Side in pixels that the generator paints now; below the image size while it grows."""
        return 2 ** math.ceil(getattr(self.step.generator, "growth", math.log2(self.model.image_size)))

    @property
    def images_total(self) -> int:
        """Images seen when the run is complete."""
        return self.config.epochs * self.images_per_epoch

    def state(self) -> dict:
        """The whole state for a checkpoint. Random states need no place in it: all randomness follows from (seed, images)."""
        self.calibrate()
        return {
            "model": self.model.to_dict(),
            "config": self.config.to_dict(),
            "classes": self.classes,
            "class_counts": self.class_counts,
            "progress": {"images": self.images, "images_per_epoch": self.images_per_epoch, "best_kid": self.best_kid},
            "strength": self.strength,
            "verdicts": torch.stack(self._verdicts).cpu() if self._verdicts else torch.zeros(0),
            "generator": self.step.generator.state_dict(),
            "discriminator": self.step.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "opt_g": self.step.opt_g.state_dict(),
            "opt_d": self.step.opt_d.state_dict(),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    def restore(self, state: dict) -> None:
        """Take over the state of a checkpoint whose model is this one's. The learning rates are this run's: each step sets them."""
        try:
            self.step.generator.load_state_dict(state["generator"])
            self.step.discriminator.load_state_dict(state["discriminator"])
            self.ema.load_state_dict(state["ema"])
            self.step.opt_g.load_state_dict(state["opt_g"])
            self.step.opt_d.load_state_dict(state["opt_d"])
            self.images = int(state["progress"]["images"])
            self.best_kid = float(state["progress"]["best_kid"])
            self.strength, self._calibrated_at = float(state.get("strength", 0.0)), None
            self._verdicts = list(state["verdicts"].to(self.device)) if "verdicts" in state else []
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the checkpoint does not fit its own description ({str(error).splitlines()[0]}); use another one"
            ) from error

    def slow_down(self) -> None:
        """Halve both learning rates from here on; checkpoints remember it."""
        self.config = replace(self.config, lr_g=self.config.lr_g / 2, lr_d=self.config.lr_d / 2)
        self.step.config = self.config

    def restore_legacy(self, generator: dict[str, Tensor], discriminator: dict[str, Tensor] | None) -> None:
        """Start from plain state_dicts: networks only; optimisers, averages and the clock begin anew."""
        self.step.generator.load_state_dict(generator)
        self.ema.load_state_dict(generator)
        if discriminator is not None:
            self.step.discriminator.load_state_dict(discriminator)

    def calibrate(self) -> None:
        """Bring the averaged generator's batch-norm statistics up to date with its weights."""
        if self._calibrated_at == self.images:
            return
        self._calibrated_at = self.images
        calibrate(self.ema, self.model, self.device)

    # -- one step

    def train_on(self, real: Tensor, labels: Tensor) -> Tensor:
        """One step on a batch ((N, 3, S, S) in [-1, 1], (N,)); returns its STATISTICS on the device."""
        count = len(real)
        torch.manual_seed(derive_seed(self.config.seed, "step", self.images))
        z = torch.randn(count, self.model.latent_dim).to(self.device, non_blocking=True)
        real = real.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(self.device, non_blocking=True) if self.model.num_classes else None
        statistics = self.step(real, labels, z, **self._schedule(count))
        self.images += count
        self._adapt(statistics, count)
        update_ema(self.ema, self.step.generator, ema_decay(self.images, count, self.config.ema_half_life))
        return statistics

    def _schedule(self, count: int) -> dict[str, float | bool]:
        """What this step of ``count`` images differs in from others."""
        config, model = self.config, self.model
        if model.grow_from:
            reached = growth(self.images, model.grow_from, model.image_size, config.grow_images)
            for network in (self.step.generator, self.step.discriminator, self.ema):
                network.growth = reached
        return {
            "rate": learning_rate_factor(self.images, config.warmup_images, config.lr_decay, self.images_total),
            "strength": self.strength,
            "penalise": bool(config.r1 or config.r2 or config.gradient_penalty)
            and (self.images // count) % config.penalty_every == 0,
        }

    def _adapt(self, statistics: Tensor, count: int) -> None:
        """Move the augmentation's strength by D's verdicts on real images, read from the device every ADAPT_STEPS steps."""
        if not self.config.adaptive:
            return
        self._verdicts.append(statistics[STATISTICS.index("acc_real")])
        if len(self._verdicts) == ADAPT_STEPS:
            self.strength = adapt(self.strength, torch.stack(self._verdicts).mean().item(), ADAPT_STEPS * count)
            self._verdicts = []

    # -- pictures

    def sample_grid(self):
        """A PIL picture of the averaged generator's images for latents that are the same in every run: a row a class."""
        self.calibrate()
        rows = self.classes or [""] * 4
        names = [name for name in rows for _ in range(GRID_COLUMNS)]
        z = torch.stack([latent(self.model, self.config.seed, name, place) for place, name in enumerate(names)])
        labels = torch.tensor([self.classes.index(name) for name in names]) if self.classes else None
        return grid(run_generator(self.ema, z, labels, self.device), GRID_COLUMNS, self.classes)

    def sampler(self) -> Sampler:
        """The averaged generator as it is now."""
        self.calibrate()
        return Sampler(self.ema, self.model, self.classes, self.class_counts, self.device)

    @torch.no_grad()
    def share_judged_real(self, images: Tensor, labels: Tensor) -> float:
        """Share of patches that the discriminator takes for real, batch norm as in training; it learns nothing from them."""
        judge = copy.deepcopy(self.step.discriminator)  # a copy, since batch norm would remember the patches
        verdicts = []
        for part in torch.arange(len(images)).split(max(2, self.config.batch_size)):
            batch = images[part].to(self.device, memory_format=torch.channels_last)
            verdicts.append(judge(batch, labels[part].to(self.device) if self.model.num_classes else None) > 0)
        return torch.cat(verdicts).float().mean().item()


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
        self._last_save = time.monotonic()
        self._slowed, self._deaths = False, 0

    def train(self, batches_from_here: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> int | None:
        """Train to the end; return the signal that stopped it before, or None. The state is saved either way.

        batches_from_here: makes the batches from the trainer's place on the clock on. Losses or weights that are not finite lead
        back to the last good state once, with half the learning rates; data workers that die are replaced.
        """
        self._save_latest()  # a full or unwritable disk shows now and not in the night, and there is a state to go back to
        while True:
            try:
                return self._to_the_end(batches_from_here())
            except DivergedError as problem:
                self._roll_back(problem)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the GPU's memory is full at --batch_size {self.trainer.config.batch_size}; go on with --resume and a smaller "
                    "one (half of it), or start anew with a smaller --image_size or --preset"
                ) from error
            except RuntimeError as error:
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
            self.write_report("Stopped, the numbers are not finite")
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
        self.log.rewind(self.trainer.images)
        self.meter.clear()

    def _replace_workers(self, error: RuntimeError) -> None:
        """Go on from the last checkpoint after a data worker died (killed for want of memory, a crash in a decoder)."""
        if "DataLoader worker" not in str(error):
            raise error
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
        trainer, batches = self.trainer, iter(batches)
        only_when_waiting()
        while trainer.images < trainer.images_total:
            asked = time.monotonic()
            real, labels = next(batches)
            waited = time.monotonic() - asked
            epochs_before = int(trainer.epoch)
            self.meter.add(trainer.train_on(real, labels), len(real), waited)
            self._after_step(epochs_before, int(trainer.epoch))
            if self.requests.stop is not None:
                return self.requests.stop
        return None

    def _after_step(self, before: int, now: int) -> None:
        """What is due after a step that led from ``before`` to ``now`` whole epochs."""
        if self.meter.seconds >= SECONDS_BETWEEN_LINES:
            self.write_line()
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
        elif self.requests.save or time.monotonic() - self._last_save > SECONDS_BETWEEN_SAVES:
            self._save_latest()
            self.log.line(f"saved {self.folder / checkpoint.LATEST}")
        self.meter.leave_out(time.monotonic() - start)

    def write_line(self) -> None:
        """One line of fixed fields to the log, the same numbers to metrics.jsonl."""
        if self.meter.images == 0:
            return
        trainer, means = self.trainer, self.meter.read()
        left = (trainer.images_total - trainer.images) / max(means["img_s"], 1e-9)
        row = {"epoch": trainer.epoch, "res": trainer.resolution} | means
        row["augment"] = trainer.strength
        row |= {"mem_mb": peak_memory_mb(trainer.device), "left_s": left}
        self.log.line(self._as_text(row))
        self.log.metrics({name: round(value, 6) for name, value in row.items()}, trainer.images)
        self.meter.clear()
        if not np.isfinite(means["loss_d"] + means["loss_g"]):
            raise DivergedError(f"a loss is not finite (loss_d {means['loss_d']:g}, loss_g {means['loss_g']:g})")

    def _as_text(self, row: dict[str, float]) -> str:
        numbers = " ".join(f"{name} {row[name]:.3f}" for name in STATISTICS)
        return (
            f"epoch {row['epoch']:.2f}/{self.trainer.config.epochs} images {self.trainer.images} res {row['res']} {numbers} "
            f"augment {row['augment']:.2f} img/s {row['img_s']:.1f} wait {100 * row['wait']:.1f}% mem {row['mem_mb']}MB "
            f"left {duration(row['left_s'])}"
        )

    def draw_samples(self) -> None:
        """samples/epoch_0020.png from the averaged generator."""
        self.log.picture(f"epoch_{round(self.trainer.epoch):04d}.png", self.trainer.sample_grid(), self.trainer.images)

    def score(self) -> None:
        """KID and the like of the averaged generator, D's verdict on held-out patches; the best so far is kept as best.pt."""
        if self.held_out is None:
            return
        start = time.monotonic()
        scores = self.held_out.score(self.trainer.sampler().sample)
        scores["acc_held_out"] = self.trainer.share_judged_real(self.held_out.images, self.held_out.labels)
        best = scores.get("kid", math.inf) < self.trainer.best_kid
        if best:
            self.trainer.best_kid = scores["kid"]
            self._save_latest()
            checkpoint.keep_as(self.folder / checkpoint.LATEST, self.folder / checkpoint.BEST)
        self._scoring += time.monotonic() - start
        text = " ".join(f"{name} {value:.4f}" for name, value in scores.items())
        note = ", the best so far" if best else ""
        self.log.line(
            f"epoch {self.trainer.epoch:.2f} scores {text}{note} (scoring takes {100 * self._scoring_share():.1f}% of the time)"
        )
        self.log.metrics({"epoch": round(self.trainer.epoch, 6)} | scores, self.trainer.images)

    def write_report(self, state: str) -> None:
        """report.html in the log folder; a failure costs the report and never the training."""
        start, trainer = time.monotonic(), self.trainer
        settings = trainer.model.to_dict() | trainer.config.to_dict()
        settings |= {"classes": ", ".join(trainer.classes) or "none", "patches an epoch": trainer.images_per_epoch}
        settings |= {"device": describe(trainer.device), "torch": torch.__version__}
        facts = Facts(state, trainer.images, trainer.images_total, trainer.config.epochs, settings)
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
        path, keep = self.folder / checkpoint.LATEST, self.habits.keep
        save_patiently(path, state, keep, self.log.line, lambda: self.requests.stop is not None)
        self.requests.save = False
        self._last_save = time.monotonic()

    def _save_numbered(self) -> None:
        self._save_latest()
        checkpoint.keep_as(self.folder / checkpoint.LATEST, checkpoint.numbered(self.folder, round(self.trainer.epoch)))
        checkpoint.prune(self.folder, self.habits.keep)

    def _finish(self) -> None:
        self.draw_samples()
        if self.habits.eval_every:
            self.score()
        self._save_numbered()
        final = self.folder / checkpoint.FINAL
        checkpoint.keep_as(self.folder / checkpoint.LATEST, final)
        self.log.line(f"done: {self.trainer.config.epochs} epochs, {self.trainer.images} images; the generator is in {final}")
        self.write_report("Done")


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` epochs was reached between two counts; never when ``every`` is 0."""
    return every > 0 and before // every < after // every
