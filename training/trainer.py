"""One run's state: networks, optimisers, averaged weights, its place on the clock; and one step of it."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.errors import UserError
from common.seeding import derive_seed
from models import build
from models.augment import adapt
from models.config import ModelConfig, View
from models.ema import ema_decay, make_ema, update_ema
from models.layers import GROUP, run_alone
from models.losses import RELATIVE, judged_rightly
from training import checkpoint
from training.config import TrainConfig
from training.processes import Processes
from training.recording import Recorder, Stream
from training.sampling import Sampler, calibrate
from training.schedule import growth, learning_rate_factor, view_of
from training.step import STATISTICS, Batch, GanStep, directly, restore_optimizer, seen_by

ADAPT_STEPS = 16


def best_of(progress: dict) -> tuple[float, str]:
    """A checkpoint's lowest KID, and a digest of the patches that it is against; "" in those of before it was written down."""
    return float(progress["best_kid"]), str(progress.get("best_scored_on", ""))


class Trainer:
    """One run: its networks, its place on the clock (``images`` seen).

    Raises UserError when the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        classes: Sequence[str],
        class_counts: Sequence[int],
        images_per_epoch: int,
        device: torch.device,
        processes: Processes | None = None,
    ):
        self.processes = processes or Processes()
        self._check_batch(model, config.batch_size)
        torch.manual_seed(derive_seed(config.seed, "weights"))
        generator, discriminator = (network.to(device, memory_format=torch.channels_last) for network in build(model))
        self.model, self.config, self.device = model, config, device
        self.classes, self.class_counts = list(classes), list(class_counts)
        self.images_per_epoch, self.images = images_per_epoch, 0
        self.origin = 0.0, 0  # epochs and images seen when the folder got as many patches as it has now
        self.step = GanStep(generator, discriminator, config, self.processes, model.num_classes)
        self._record_steps()
        self.ema = make_ema(generator)
        self.best_kid, self.best_scored_on = math.inf, ""
        self.strength = 0.0  # of the augmentation in front of D
        self._verdicts: list[Tensor] = []
        self._calibrated_at: int | None = None

    def _record_steps(self) -> None:
        """From here on, and with the optimisers as they now are. Not what speaks to other processes, or takes a batch in parts."""
        if self.device.type == "cuda" and self.processes.world == 1 and self.step.parts == 1:
            self.step.perform = Recorder(Stream(self.device))

    def _check_batch(self, model: ModelConfig, batch_size: int) -> None:
        world = self.processes.world
        least = GROUP if model.model == "improved" else 1
        if world > 1 and batch_size % (least * world):
            raise UserError(
                f"--batch_size {batch_size} is that of all {world} processes together and must be a multiple of {least * world} "
                f"for {model.model}; choose {max(1, round(batch_size / (least * world))) * least * world}"
            )

    # -- state

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""
        epochs, images = self.origin
        return epochs + (self.images - images) / self.images_per_epoch

    @property
    def resolution(self) -> int:
        """Side in pixels that the generator paints now; below the image size while it grows."""
        return 2 ** math.ceil(getattr(self.step.generator, "growth", math.log2(self.model.image_size)))

    @property
    def images_total(self) -> int:
        """Images seen when the run is complete."""
        epochs, images = self.origin
        return images + max(0, round((self.config.epochs - epochs) * self.images_per_epoch))

    def state(self) -> dict:
        """The whole state for a checkpoint. Random states need no place in it: all randomness follows from (seed, images)."""
        self.calibrate()
        return {
            "model": self.model.to_dict(),
            "config": self.config.to_dict(),
            "classes": self.classes,
            "class_counts": self.class_counts,
            "progress": {
                "images": self.images,
                "images_per_epoch": self.images_per_epoch,
                "origin": self.origin,
                "best_kid": self.best_kid,
                "best_scored_on": self.best_scored_on,
            },
            "strength": self.strength,
            "verdicts": torch.stack(self._verdicts).cpu() if self._verdicts else torch.zeros(0),
            "generator": self.step.generator.state_dict(),
            "discriminator": self.step.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "opt_g": self.step.opt_g.state_dict(),
            "opt_d": self.step.opt_d.state_dict(),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        } | self._graders_state()

    def _graders_state(self) -> dict:
        step = self.step
        return {"graders": step.graders.state_dict(), "opt_c": step.opt_c.state_dict()} if step.graders else {}

    def restore(self, state: dict) -> None:
        """Take over the state of a checkpoint whose model is this one's. The learning rates are this run's: each step sets them."""
        try:
            self.step.generator.load_state_dict(state["generator"])
            self.step.discriminator.load_state_dict(state["discriminator"])
            self.ema.load_state_dict(state["ema"])
            restore_optimizer(self.step.opt_g, state["opt_g"])
            restore_optimizer(self.step.opt_d, state["opt_d"])
            if "graders" in state and self.step.graders:
                self.step.graders.load_state_dict(state["graders"])
                restore_optimizer(self.step.opt_c, state["opt_c"])
            self._record_steps()
            self.images = int(state["progress"]["images"])
            self.origin = checkpoint.origin_for(state["progress"], self.images_per_epoch)
            self.best_kid, self.best_scored_on = best_of(state["progress"])
            self.strength, self._calibrated_at = float(state.get("strength", 0.0)), None
            self._verdicts = list(state["verdicts"].to(self.device)) if "verdicts" in state else []
        except (KeyError, RuntimeError, ValueError, ArithmeticError, TypeError, AttributeError) as error:
            raise UserError(
                f"the checkpoint does not fit its own description ({str(error).splitlines()[0]}); use another one"
            ) from error

    def speed_up(self, half: bool, compiled: bool) -> None:
        """half: calculate in bfloat16 where GanStep says so. compiled: translate the generator by torch.compile.

        Not the discriminator: penalties need its second derivative, which compiled modules do not have.
        """
        self.step.half = half
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # of one forward in all its levels and sizes: the default of 8 gives up
            for module in getattr(self.step.generator, "levels", [self.step.generator]):
                module.compile(dynamic=False)

    def divide(self) -> bool:
        """Take each batch in twice as many parts from here on; False where they would become too small."""
        step, least = self.step, GROUP if self.model.model == "improved" else 2
        if self.config.batch_size % (2 * step.parts * least * self.processes.world):
            return False
        step.parts, step.perform = 2 * step.parts, directly
        return True

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
        """One step on this process's share of a batch ((n, 3, S, S) in [-1, 1], (n,)); returns its STATISTICS on the device."""
        count, seed = len(real) * self.processes.world, derive_seed(self.config.seed, "step", self.images)
        real = real.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(self.device, non_blocking=True) if self.model.num_classes else None
        schedule, view = self._schedule(count), self._view(count)
        z, corners = self._draw(count, seed, view)
        statistics = self.step(Batch(real, labels, z, seed, self.strength, view, corners), **schedule)
        self.images += count
        self._adapt(statistics, count)
        update_ema(self.ema, self.step.generator, ema_decay(self.images, count, self.config.ema_half_life))
        return statistics

    def _draw(self, count: int, seed: int, view: View | None) -> tuple[Tensor, Tensor | None]:
        """z and corners of windows for this process's share of a batch.

        Drawn on the CPU and for the whole batch: a run is the same on any device and for any number of processes.
        """
        # Of a seed of their own: the step's is the augmentation's, which would draw the same numbers.
        mine, random = slice(self.processes.rank, None, self.processes.world), torch.Generator()
        random.manual_seed(derive_seed(seed, "latents"))
        z = self._moved(torch.randn(count, self.model.latent_dim, generator=random)[mine])
        if view is None or not view.windowed:
            return z, None
        corners = torch.rand(count, 2, generator=random) * (view.resolution - view.side + 1)
        return z, self._moved(corners[mine])

    def _moved(self, values: Tensor) -> Tensor:
        """To the device, without waiting for what it is doing."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values

    def _schedule(self, count: int) -> dict[str, float | bool]:
        """What this step of ``count`` images differs in from others."""
        config = self.config
        return {
            "rate": learning_rate_factor(self.images, config.warmup_images, config.lr_decay, self.images_total),
            "penalise": bool(config.r1 or config.r2 or config.gradient_penalty)
            and (self.images // count) % config.penalty_every == 0,
        }

    def _view(self, count: int) -> View | None:
        """What this step of ``count`` images looks at, told to the networks as well; None for the baseline."""
        config, model = self.config, self.model
        if not model.grow_from:
            return None
        reached = growth(self.images, model.grow_from, model.image_size, config.grow_images)
        self.step.generator.growth = self.ema.growth = reached
        view = view_of(reached, model.seen, self.images // count, config.penalty_every, bool(model.reduced_to))
        self.step.discriminator.set_view(view)
        return view

    def _adapt(self, statistics: Tensor, count: int) -> None:
        """Move the augmentation's strength by D's verdicts on real images, read from the device every ADAPT_STEPS steps."""
        if not self.config.adaptive:
            return
        self._verdicts.append(statistics[STATISTICS.index("acc_real")])
        if len(self._verdicts) == ADAPT_STEPS:
            share, pairs = torch.stack(self._verdicts).mean().item(), self.config.objective in RELATIVE
            self.strength = adapt(self.strength, share, ADAPT_STEPS * count, pairs)
            self._verdicts = []

    # -- looking at it

    def sampler(self) -> Sampler:
        """The averaged generator as it is now."""
        self.calibrate()
        return Sampler(self.ema, self.model, self.classes, self.class_counts, self.device)

    @torch.no_grad()
    def share_judged_real(self, images: Tensor, labels: Tensor) -> float:
        """Share of patches that the discriminator takes for real, batch norm as in training; it learns nothing from them.

        With RELATIVE objectives: that it takes for more real than a generated image of their label.
        """
        # Copies, since batch norm would remember the images.
        judge = run_alone(copy.deepcopy(self.step.discriminator))
        view = View(self.step.generator.growth) if self.model.grow_from else None  # at full size; averaged down where D sees less
        paint = run_alone(copy.deepcopy(self.step.generator)) if self.config.objective in RELATIVE else None
        random = torch.Generator().manual_seed(derive_seed(self.config.seed, "judged", self.images))
        real, fake = [], []
        for part in torch.arange(len(images)).split(max(2, self.config.batch_size)):
            batch = images[part].to(self.device, memory_format=torch.channels_last)
            asked = labels[part].to(self.device) if self.model.num_classes else None
            real.append(judge(seen_by(view, batch, None), asked))
            if paint:
                z = torch.randn(len(part), self.model.latent_dim, generator=random).to(self.device)
                fake.append(judge(paint(z, asked, view) if view else paint(z, asked), asked))
        # Without generated images only the share of real ones, which is all that is asked for, says anything.
        return judged_rightly(self.config.objective, torch.cat(real), torch.cat(fake or real))[0].item()
