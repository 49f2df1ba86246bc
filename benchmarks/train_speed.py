"""What train.py costs beside its arithmetic: images per second of the whole program against the bare step.

python benchmarks/train_speed.py [--patches datasets/patches] [--image_size 64] [--batch_size 16] [--steps 60] [--rounds 5]

The bare step is the same networks, optimisers and average in a loop over one batch that lies in memory; the whole program reads
patches, augments, logs and measures. Both run in turn in one process, so that the ratio holds on a noisy machine.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from data.augment import Augmentation
from data.dataset import PatchDataset
from models.config import dcgan_config
from train import make_loader
from training.config import TrainConfig
from training.device import choose_device, describe
from training.run import Habits, Run
from training.runlog import RunLog
from training.signals import SignalRequests
from training.trainer import Trainer


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--patches", type=Path, help="folder of patches; default 256 random ones")
    parser.add_argument("--image_size", type=int, choices=(64, 128, 256), default=64, help="side in pixels, default %(default)s")
    parser.add_argument("--batch_size", type=cli.positive_int, default=16, help="images a step, default %(default)s")
    parser.add_argument("--steps", type=cli.positive_int, default=60, help="steps of each kind in a round, default %(default)s")
    parser.add_argument("--rounds", type=cli.positive_int, default=5, help="repetitions, default %(default)s")
    args = parser.parse_args()
    device = choose_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        dataset = PatchDataset(args.patches or random_patches(Path(folder)), args.image_size, augmentation=Augmentation())
        whole, bare = zip(*(one_round(args, dataset, device, Path(folder)) for _ in range(args.rounds)), strict=True)
    ratios = [a / b for a, b in zip(whole, bare, strict=True)]
    print(f"{describe(device)}, torch {torch.__version__}, DCGAN {args.image_size}x{args.image_size}, batch {args.batch_size}")
    print(f"{'':24}{'min':>8}{'median':>8}{'max':>8}")
    for name, values in (("train.py, images/s", whole), ("bare step, images/s", bare), ("ratio", ratios)):
        print(f"{name:24}{min(values):8.3g}{statistics.median(values):8.3g}{max(values):8.3g}")


def one_round(args: argparse.Namespace, dataset: PatchDataset, device: torch.device, folder: Path) -> tuple[float, float]:
    """Images per second of (the whole loop, the bare step)."""
    images = args.steps * args.batch_size
    config = TrainConfig("", "none", epochs=1, batch_size=args.batch_size, augmentation=Augmentation().to_dict())
    trainer = Trainer(dcgan_config(args.image_size, 0), config, [], [], images, device)
    batch = torch.rand(args.batch_size, 3, args.image_size, args.image_size) * 2 - 1, torch.zeros(args.batch_size, dtype=torch.long)
    for _ in range(3):
        trainer.train_on(*batch)
    bare = rate(images, lambda: [trainer.train_on(*batch) for _ in range(args.steps)], device)
    trainer.images = 0
    run = Run(trainer, Habits(0, 0, 0, 1), folder, RunLog(folder), SignalRequests())
    loader = make_loader(trainer, dataset, None)
    return rate(images, lambda: run.loop(loader), device), bare


def rate(images: int, work, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def random_patches(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(256):
        Image.fromarray(random.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(folder / f"{number}.png", compress_level=1)
    return folder


if __name__ == "__main__":
    cli.run(main)
