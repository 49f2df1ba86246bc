"""Does the data keep up with the training?

    python benchmarks/feeding.py [--patches datasets/patches] [--image_size 64] [--batch_size 8] [--rounds 3]

Images per second, in turns in one process without loader processes: decoding the files; reading the cache of decoded pixels; the
loader with the default augmentation, and with each costly one; and what training needs, the improved model's and the DCGAN's bare
steps. Prints the share of the time that training would wait for its data.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.train_speed import random_patches
from common import cli
from data.augment import Augmentation
from data.dataset import PatchDataset, decode
from data.order import BalancedOrder, BatchesFrom
from models.config import painted_size
from training.config import TrainConfig
from training.device import choose_device, describe
from training.presets import networks, training_defaults
from training.trainer import Trainer

MODELS = ("improved", "dcgan")
SECONDS = 4.0
KINDS = {
    "default": {},
    "rotation 15": {"rotation": 15.0},
    "color_jitter 0.1": {"color_jitter": 0.1},
    "stain_jitter 0.1": {"stain_jitter": 0.1},
    "elastic 3": {"elastic": 3.0},
    "noise 3": {"noise": 3.0},
}


def rate(batch: Callable[[int], int]) -> float:
    """Images per second of ``batch(number)``, which returns how many it did."""
    start, done, number = time.perf_counter(), 0, 0
    while time.perf_counter() - start < SECONDS:
        done, number = done + batch(number), number + 1
    return done / (time.perf_counter() - start)


def reading(dataset: PatchDataset, folder: Path, side: int) -> dict[str, Callable[[int], int]]:
    """Eight patches of ``side`` pixels from their files and from the cache."""
    count = len(dataset)
    return {
        f"decoding files, {side}": lambda k: len(
            [decode(folder / dataset.files[(k * 8 + i) % count].path, side) for i in range(8)]
        ),
        f"reading the cache, {side}": lambda k: len([np.sum(dataset.pixels((k * 8 + i) % count)[0]) for i in range(8)]),
    }


def loading(dataset: PatchDataset, size: int) -> Callable[[int], int]:
    """Draw batches of ``size`` as training does, without other processes."""
    draws = iter(BatchesFrom(BalancedOrder(dataset.groups(), 0), size, 0, 10**9))

    def one(_: int) -> int:
        torch.stack([dataset[draw][0] for draw in next(draws)])
        return size

    return one


def stepping(model: str, size: int, batch_size: int, device: torch.device) -> Callable[[int], int]:
    """Steps of a model at full size on one batch that lies in memory."""
    side = painted_size(model, size)
    config = TrainConfig("", "label", batch_size=batch_size, **training_defaults(model, None))
    trainer = Trainer(networks(model, size, 4, grow_from=side), config, list("abcd"), [1] * 4, 10**6, device)
    batch = torch.rand(batch_size, 3, side, side) * 2 - 1, torch.arange(batch_size) % 4
    trainer.train_on(*batch)

    def one(_: int) -> int:
        trainer.train_on(*batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return batch_size

    return one


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--patches", type=Path, help="folder of patches; default 256 random ones")
    parser.add_argument("--image_size", type=int, choices=(64, 128, 256), default=64, help="side in pixels, default %(default)s")
    parser.add_argument("--batch_size", type=cli.positive_int, default=8, help="images a step, default %(default)s")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="the best counts, default %(default)s")
    args = parser.parse_args()
    device = choose_device("auto")
    with tempfile.TemporaryDirectory() as home:
        folder, size = args.patches or random_patches(Path(home)), args.image_size
        ways: dict[str, Callable[[int], int]] = {}
        for side in sorted({painted_size(model, size) for model in MODELS}):
            data = {kind: PatchDataset(folder, side, augmentation=replace(Augmentation(), **KINDS[kind])) for kind in KINDS}
            ways |= reading(data["default"], folder, side)
            ways |= {f"loader, {kind}, {side}": loading(dataset, args.batch_size) for kind, dataset in data.items()}
        ways |= {f"training, {model}": stepping(model, size, args.batch_size, device) for model in MODELS}
        best: dict[str, float] = {}
        for _ in range(args.rounds):
            for name, way in ways.items():
                best[name] = max(best.get(name, 0.0), rate(way))
    print(f"{describe(device)}, torch {torch.__version__}, {size}x{size}, batch {args.batch_size}, best of {args.rounds}")
    for name, value in best.items():
        print(f"{name:34}{value:10.1f} images/s")
    for model in MODELS:
        for kind in KINDS:
            need, give = best[f"training, {model}"], best[f"loader, {kind}, {painted_size(model, size)}"]
            print(
                f"{model} waits {100 * need / (need + give):5.2f} % of its time for augmentation {kind}, without loader processes"
            )
    return 0


if __name__ == "__main__":
    cli.run(main)
