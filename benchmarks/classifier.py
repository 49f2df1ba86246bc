"""What do generated images do to the training of a convolutional network?

    python generate.py --checkpoint checkpoints/G_final.pt --num 1000 --best_of 4 --out generated
    python benchmarks/classifier.py --patches datasets/patches --generated generated

Trains a classifier of the labels on the training slides in several ways and tests it on the held-out slides: on real patches, on
batches of which half are generated, on generated images alone, on generated images first and real ones after them, and on real
ones for as long as that. Every way starts from the same weights and has the same augmentation, mirroring, quarter turns and the
strength of the stain. ``small``: four convolutions from nothing, 12 minutes a seed on two Zen 5 cores;
``lite0``: EfficientNet-Lite0 from ImageNet's weights, 8 minutes a seed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.errors import UserError
from common.labels import known
from common.progress import track
from data.dataset import class_of, condition_of, list_patches, reader
from data.holdout import train_and_held_out, what_flatters
from metrics.images import ImageSet, image_set, read_images
from metrics.utility import balanced_accuracy, confusion, shared_classes
from models.features import load_lite0

BATCH = 32
LEARNING_RATE = {"small": 2e-3, "lite0": 3e-4}
STEPS = {"small": 600, "lite0": 250}
STAIN = 0.1  # standard deviation of each colour's distance from white
# Parts of the training: its length as a share of --steps, and the share of generated images in it.
WAYS = {
    "real": [(1.0, 0.0)],
    "half of each batch generated": [(1.0, 0.5)],
    "generated alone": [(1.0, 1.0)],
    "generated first, then real": [(0.5, 1.0), (1.0, 0.0)],
    "real for as long": [(0.5, 0.0), (1.0, 0.0)],
}


def small(classes: int) -> nn.Module:
    """(N, 3, S, S) -> logits (N, classes): 3x3 convolutions with batch norm, each halving the size."""
    widths = (3, 24, 48, 96, 128)
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1], classes))


def lite0(classes: int) -> nn.Module:
    """EfficientNet-Lite0 as ImageNet left it, every weight free to move, under a new last layer."""
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    load_lite0(network)
    return nn.Sequential(network, nn.Dropout(0.2), nn.Linear(network.num_features, classes))


NETWORKS = {"small": small, "lite0": lite0}
Sets = tuple[ImageSet, ImageSet, ImageSet]  # training, held-out, generated


def to_input(images: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, draws: torch.Generator) -> Tensor:
    """Each group of four mirrored and turned alike, each image with its own strength of each colour."""

    def moved(part: Tensor) -> Tensor:
        mirror, turns = bool(torch.rand((), generator=draws) < 0.5), int(torch.randint(4, (), generator=draws))
        return torch.rot90(part.flip(3) if mirror else part, turns, (2, 3))

    images = torch.cat([moved(part) for part in images.split(4)])
    strength = 1.0 + STAIN * torch.randn(len(images), 3, 1, 1, generator=draws)
    return ((images - 1.0) * strength + 1.0).clamp(-1.0, 1.0).contiguous(memory_format=torch.channels_last)


def draw_batch(sets: tuple[ImageSet, ImageSet], share: float, classes: np.ndarray, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """As many images of each class as of any other; each from sets[1] with probability ``share``, else from sets[0]."""
    images, targets = [], torch.arange(BATCH) % len(classes)
    for target in targets.tolist():
        part = sets[int(torch.rand((), generator=draws) < share)]
        own = np.flatnonzero(part.labels == classes[target])
        images.append(part.images[own[int(torch.randint(len(own), (), generator=draws))]])
    return augmented(to_input(np.stack(images)), draws), targets


def fit(network: nn.Module, rate: float, steps: int, draw: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """One part of a training: its own optimiser, a rate that rises for a tenth of it and falls to 0."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, 10 * (step + 1) / steps) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    )
    network.train()
    for _ in range(steps):
        images, targets = draw()
        loss = F.cross_entropy(network(images), targets, label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def predicted(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """Indices of classes (N,), from the mean over the four quarter turns."""
    network.eval()
    turns = [
        torch.cat([network(torch.rot90(part, turn, (2, 3))).softmax(1) for part in to_input(images).split(BATCH)])
        for turn in range(4)
    ]
    return sum(turns).argmax(1).numpy()


def read_sets(patches: Path, generated: Path, side: int) -> Sets:
    """Images that have a label, reduced to ``side`` pixels; the patches' are named as the generated images' folders are."""
    made = list_patches(generated, "make some with generate.py or name yours with --generated")
    condition = condition_of({file.label for file in made})

    def read(folder, files, condition):
        labels = {file.path: label for file in files if (label := known(class_of(file, condition)))}
        if not labels:
            raise UserError(f"no labelled images in {folder}; generate.py and extract_patches.py write one folder a label")
        images = read_images([folder / path for path in labels], reader(folder), side, "read")
        return image_set(images, list(labels.values()))

    train, held_out = train_and_held_out(patches)
    for note in what_flatters(train, held_out):
        print(note)
    return read(patches, train, condition), read(patches, held_out, condition), read(generated, made, "label")


def accuracy(args: argparse.Namespace, way: str, seed: int, sets: Sets, classes: np.ndarray) -> float:
    """Balanced accuracy on the held-out patches after a training in one of WAYS."""
    train, held_out, generated = sets
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    network = NETWORKS[args.network](len(classes)).to(memory_format=torch.channels_last)
    for length, share in WAYS[way]:
        steps = max(1, round(length * (args.steps or STEPS[args.network])))
        fit(network, LEARNING_RATE[args.network], steps, lambda share=share: draw_batch((train, generated), share, classes, draws))
    return balanced_accuracy(confusion(held_out.labels, classes[predicted(network, held_out.images)], classes))


def spread(scores: np.ndarray) -> str:
    """The standard deviation over seeds, where there are several."""
    return f" ± {scores.std(ddof=1):.3f}" if len(scores) > 1 else ""


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--patches", type=Path, default=Path("datasets/patches"), help="default %(default)s")
    parser.add_argument("--generated", type=Path, default=Path("generated"), help="what generate.py wrote, default %(default)s")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="small", help="default %(default)s")
    parser.add_argument("--side", type=cli.positive_int, default=128, help="pixels that it is shown, default %(default)s")
    parser.add_argument(
        "--steps",
        type=cli.positive_int,
        help=f"steps of {BATCH} images, default {', '.join(f'{n} for {name}' for name, n in STEPS.items())}",
    )
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="trainings of each way, default %(default)s")
    args = parser.parse_args()
    sets = read_sets(args.patches, args.generated, args.side)
    classes = shared_classes(*sets)
    if len(classes) < 2:
        raise UserError("fewer than two labels have 20 images each in training, held-out and generated sets; use more slides")
    sets = tuple(part.take(np.isin(part.labels, classes)) for part in sets)
    print(f"{len(sets[0])} training, {len(sets[1])} held-out and {len(sets[2])} generated images of {', '.join(classes)}")
    print(f"{'taught by':30} balanced accuracy (guessing {1 / len(classes):.2f})   against real")
    real = None
    for way in WAYS:
        scores = np.array([accuracy(args, way, seed, sets, classes) for seed in track(range(args.seeds), way, unit="trainings")])
        real = scores if real is None else real
        print(f"{way:30} {scores.mean():.3f}{spread(scores)}   {(scores - real).mean():+.3f}{spread(scores - real)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
