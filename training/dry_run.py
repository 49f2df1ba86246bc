"""What a run would be, before it is one."""

from __future__ import annotations

import time
from collections.abc import Iterable

from torch import Tensor

from common.progress import say
from training.device import describe, peak_memory_mb
from training.runlog import duration
from training.trainer import Trainer


def dry_run(trainer: Trainer, loader: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Say what a run would be, from a few real steps that are thrown away."""
    batches = iter(loader)
    trainer.train_on(*next(batches))  # the first step pays for warming up
    start, images = time.monotonic(), trainer.images
    while trainer.images < trainer.images_total and time.monotonic() - start < 5:
        trainer.train_on(*next(batches))
    rate = max(trainer.images - images, 1) / (time.monotonic() - start)
    step = trainer.step
    millions = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (step.generator, step.discriminator)]
    for name, value in (trainer.model.to_dict() | trainer.config.to_dict()).items():
        say(f"{name:>16}  {value}")
    say(f"{'parameters':>16}  generator {millions[0]:.2f} M, discriminator {millions[1]:.2f} M")
    say(f"{'memory':>16}  {peak_memory_mb(trainer.device)} MB on {describe(trainer.device)}")
    say(f"{'speed':>16}  {rate:.1f} images/s")
    say(f"{'one epoch':>16}  {trainer.images_per_epoch} patches, {duration(trainer.images_per_epoch / rate)}")
    say(f"{'whole run':>16}  {trainer.config.epochs} epochs, {duration(trainer.images_total / rate)}")
    return 0
