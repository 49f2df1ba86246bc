"""What a run would be, before it is one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

from torch import Tensor

from common.progress import say
from training.device import describe, peak_memory_mb
from training.presets import settings_of
from training.runlog import duration
from training.trainer import Trainer

SECONDS = 4.0  # for each resolution


def dry_run(trainer: Trainer, loader: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Say what a run would be, from a few real steps that are thrown away."""
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # a short run's are too few to measure
    begun = trainer.epoch
    trainer.train_on(*next(batches))  # the first step pays for warming up
    done, seconds = trainer.images, 0.0
    rates = []
    for start, end in stages(trainer):
        rates.append(_rate(trainer, batches, start))
        seconds += max(0, end - max(start, done)) / rates[-1]
    step = trainer.step
    millions = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (step.generator, step.discriminator)]
    for name, value in settings_of(trainer).items():
        say(f"{name:>16}  {value}")
    say(f"{'parameters':>16}  generator {millions[0]:.2f} M, discriminator {millions[1]:.2f} M")
    say(f"{'memory':>16}  {peak_memory_mb(trainer.device)} MB on {describe(trainer.device)}")
    say(f"{'speed':>16}  {', '.join(f'{rate:.1f}' for rate in rates)} images/s" + (" as it grows" if len(rates) > 1 else ""))
    say(f"{'one epoch':>16}  {trainer.images_per_epoch} patches, {duration(trainer.images_per_epoch / rates[-1])}")
    left = f" from epoch {begun:.0f} on" if begun >= 1 else ""
    say(f"{'whole run':>16}  {trainer.config.epochs} epochs, {duration(seconds)}{left}")
    return 0


def stages(trainer: Trainer) -> list[tuple[int, int]]:
    """(first image, image after the last) of each resolution of the run; one stage without progressive growing."""
    model, total = trainer.model, trainer.images_total
    doublings = (model.image_size // model.grow_from).bit_length() - 1 if model.grow_from else 0
    # A resolution costs as much while it fades in as later: its stage starts with the fading.
    starts = [0] + [(2 * number + 1) * trainer.config.grow_images for number in range(doublings)]
    return [(start, min(end, total)) for start, end in zip(starts, [*starts[1:], total], strict=True) if start < total]


def _rate(trainer: Trainer, batches: Iterator[tuple[Tensor, Tensor]], images: int) -> float:
    """Images per second of the steps from ``images`` images seen on: whole turns of windows, whole images and penalties."""
    trainer.images = images + 1
    _step(trainer, batches)  # a new resolution's first steps pay for warming up
    _step(trainer, batches)
    begun, count = time.monotonic(), 0
    while time.monotonic() - begun < SECONDS:
        count += sum(_step(trainer, batches) for _ in range(trainer.config.penalty_every))
    return count / (time.monotonic() - begun)


def _step(trainer: Trainer, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
    """Images of the next batch, trained on."""
    batch = next(batches)
    trainer.train_on(*batch)
    return len(batch[0])
