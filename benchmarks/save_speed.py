"""What share of a training goes into checkpoints, sample pictures and reports?

    python benchmarks/save_speed.py [--sizes 64 256] [--presets cpu large] [--patches_an_epoch 900] [--rounds 3]

For the improved model at each size and preset, on this machine: seconds for one checkpoint (state gathered, checked, serialised,
flushed to the disk, a numbered copy linked), one sample picture, one report of 24 pictures and 2,000 log lines, and one step of
batch 8 at full size. Then the share of the time that they take in a run with train.py's defaults: a checkpoint every 10 epochs and
every 15 minutes, a picture and a report every 5 epochs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import cli
from models.config import WIDTHS
from training import checkpoint
from training.config import TrainConfig
from training.device import choose_device, describe
from training.presets import networks, training_defaults
from training.run import SECONDS_BETWEEN_SAVES, Habits, Run
from training.runlog import RunLog
from training.signals import SignalRequests
from training.trainer import Trainer

BATCH = 8
GRIDS, LINES = 24, 2_000


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median of ``rounds``."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(size: int, preset: str, images_per_epoch: int, rounds: int, home: Path, device: torch.device) -> str:
    """One line of the table."""
    config = TrainConfig("", "label", epochs=200, batch_size=BATCH, **training_defaults("improved", None))
    trainer = Trainer(networks("improved", size, 4, preset), config, list("abcd"), [1] * 4, images_per_epoch, device)
    trainer.images = trainer.images_total - 100 * BATCH  # grown to full size
    side = trainer.model.image_size
    batch = torch.rand(BATCH, 3, side, side) * 2 - 1, torch.arange(BATCH) % 4

    def steps() -> None:  # eight, since one of them takes the penalties
        for _ in range(8):
            trainer.train_on(*batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    trainer.train_on(*batch)
    step = seconds(steps, rounds) / 8
    log = RunLog(home)
    run = Run(trainer, Habits(10, 5, 5, 3), home, log, SignalRequests())
    for line in range(LINES):
        row = dict.fromkeys(("loss_d", "loss_g", "acc_real", "acc_fake", "diversity", "grad_d", "grad_g"), 0.5)
        log.metrics({"epoch": line / 10, "img_s": 8.0, "wait": 0.0} | row, line * 90)
    grid = seconds(run.draw_samples, rounds)
    picture = trainer.sampler().grid(trainer.classes, 0)
    for epoch in range(GRIDS):
        log.picture(f"epoch_{epoch:04d}.png", picture, 0)
    save = seconds(run._save_numbered, rounds)
    run.write_report("Running")  # the pictures of the page before are kept encoded

    def report() -> None:
        (home / "samples" / f"epoch_{GRIDS - 1:04d}.png").touch()
        run.write_report("Running")

    page = seconds(report, rounds)
    megabytes = (home / checkpoint.LATEST).stat().st_size / 1e6
    epoch = images_per_epoch / BATCH * step
    share = save / (10 * epoch) + save / SECONDS_BETWEEN_SAVES + (grid + page) / (5 * epoch)
    return (
        f"{size:>5} {preset:>6}{megabytes:8.0f} MB{save:9.2f} s{grid:9.2f} s{page:9.2f} s{step:9.2f} s{epoch:9.0f} s{share:10.2%}"
    )


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", choices=(64, 128, 256), default=[64, 256], help="sides in pixels, default 64 256"
    )
    parser.add_argument("--presets", nargs="+", choices=sorted(WIDTHS), default=["cpu", "large"], help="default cpu large")
    parser.add_argument("--patches_an_epoch", type=cli.positive_int, default=900, help="default %(default)s")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="the median counts, default %(default)s")
    args = parser.parse_args()
    device = choose_device("auto")
    print(f"{describe(device)}, torch {torch.__version__}, {args.patches_an_epoch} patches an epoch")
    print(f"{'size preset':>12}{'':4}checkpoint{'':8}picture{'':4}report{'':7}step{'':6}epoch{'':5}share")
    for size in args.sizes:
        for preset in args.presets:
            with tempfile.TemporaryDirectory() as home:
                print(measure(size, preset, args.patches_an_epoch, args.rounds, Path(home), device), flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
