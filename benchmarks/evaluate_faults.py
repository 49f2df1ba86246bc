"""Does evaluate.py name the faults it claims to name, and leave real tissue alone?

    python benchmarks/evaluate_faults.py --patches datasets/patches --size 64

Plants each fault in held-out real patches, which then play the generated images, and prints what the evaluation objects to;
the other half of the held-out slides is the control. Then plays real patches of randomly chosen slides as generated ones: every
objection to those is a false alarm. Variety and grades use EfficientNet-Lite0 instead of Inception, which takes ten times as long.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import map_coordinates

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.errors import UserError
from common.labels import known
from data.dataset import decode
from data.holdout import train_and_held_out
from metrics.copies import Gallery
from metrics.evaluation import Networks, Sets, assess
from metrics.features import lite0
from metrics.images import ImageSet, read_images
from metrics.pixel_search import SIDE
from models.features import LITE0_WEIGHTS, Lite0

SKIP = ("distances", "utility")


def soft(images: np.ndarray) -> np.ndarray:
    return np.clip(images, 0, 255).astype(np.uint8)


def off_grid(images: np.ndarray) -> np.ndarray:
    """Moved by 3/64 of the side down and 5/64 across, which no stride of a network divides; reflections fill the margin."""
    side = images.shape[1]
    down, across = 3 * side // 64, 5 * side // 64
    return np.pad(images, ((0, 0), (0, down), (0, across), (0, 0)), mode="reflect")[:, down:, across:]


def turned(images: np.ndarray, angle: float, size: float) -> np.ndarray:
    """Turned by ``angle`` degrees about the middle and ``size`` times as large; mirrors fill the corners."""
    middle = (images.shape[1] - 1) / 2
    cosine, sine = np.cos(np.radians(angle)) / size, np.sin(np.radians(angle)) / size
    down, across = np.mgrid[: images.shape[1], : images.shape[1]] - middle
    places = np.stack([cosine * down - sine * across, sine * down + cosine * across]) + middle
    channels = np.moveaxis(images, 3, 1).reshape(-1, *images.shape[1:3]).astype(np.float32)
    read = np.stack([map_coordinates(channel, places, order=1, mode="mirror") for channel in channels])
    return soft(np.moveaxis(read.reshape(len(images), 3, *images.shape[1:3]), 1, 3))


def planted_copies(fake: np.ndarray, train: np.ndarray, kind: str) -> np.ndarray:
    """A twentieth of the images replaced by copies."""
    count = max(len(fake) // 20, 2)
    source, other = train[:: len(train) // count][:count], train[7 :: len(train) // count][:count]
    half = np.concatenate([source[:, :, : source.shape[2] // 2], other[:, :, source.shape[2] // 2 :]], axis=2)
    made = {
        "copy": source,
        "rotated copy": np.rot90(source, 1, (1, 2)),
        "colour-shifted copy": soft(source * [0.85, 1.08, 0.92] + 8),
        "half and half": half,
        "blend of two": soft((source.astype(float) + other) / 2),
        "shifted copy": np.roll(source, source.shape[2] // 8, 2),
        "copy shifted both ways, off the grid": off_grid(source),
        "copy turned by 20 degrees": turned(source, 20, 1.0),
        "mirrored copy, 1.25 times as large": turned(source[:, :, ::-1], 0, 1.25),
    }[kind]
    return np.concatenate([made, fake[count:]])


def planted_faults(fake: np.ndarray) -> dict[str, np.ndarray]:
    """Faults of every image, from (N, S, S, 3) uint8."""
    side = fake.shape[1]
    rows, columns = np.mgrid[:side, :side]
    ring = np.abs(np.hypot(rows - side / 8, columns - side / 8) - side / 12) < max(side / 64, 1)
    seam = np.minimum.reduce([rows, columns, side - 1 - rows, side - 1 - columns]) < max(side // 64, 1)
    corner = rows + columns < side // 6
    board = np.where((rows + columns) % 2, 4, -4)
    return {
        "black corners": np.where(corner[..., None], 0, fake).astype(np.uint8),
        "ring in a corner": soft(fake - 20.0 * ring[..., None]),
        "seam at the borders": soft(fake - 12.0 * seam[..., None]),
        "colour cast": soft(fake * [0.92, 1.0, 1.0]),
        "checkerboard": soft(fake + board[..., None]),
    }


def read(patches: Path, size: int) -> tuple[ImageSet, np.ndarray, np.ndarray]:
    """All patches, their thumbnails, and which are held out. Raises UserError where they are of one slide."""
    train, held_out = train_and_held_out(patches)
    files = train + held_out
    if len({file.slide_id for file in held_out}) < 2:
        raise UserError(f"{patches} holds out one slide, and two are needed; extract patches from more slides")
    paths = [patches / file.path for file in files]
    labels = [known(file.label) for file in files]
    columns = ([f.path for f in files], labels, [f.data_provider for f in files], [f.slide_id for f in files])
    images = ImageSet(read_images(paths, decode, size, "read patches"), *map(np.array, columns))
    thumbnails = read_images(paths, decode, SIDE, "read small")
    return images, thumbnails, np.arange(len(files)) >= len(train)


def objections(
    train: ImageSet, thumbnails: np.ndarray, control: ImageSet, fake: ImageSet, networks: Networks, cache: Path
) -> Counter:
    gallery = Gallery(thumbnails, train.names, lambda index: train.images[index])
    sections = assess(Sets(train, control, fake, gallery), networks, 0, SKIP, cache)
    return Counter(finding.test for section in sections for finding in section.findings)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--patches", type=Path, default=Path("datasets/patches"), help="default %(default)s")
    parser.add_argument("--size", type=cli.positive_int, default=64, help="side in pixels, default %(default)s")
    parser.add_argument(
        "--draws", type=cli.natural, default=10, help="random choices of slides without a fault, default %(default)s"
    )
    parser.add_argument("--cache", type=Path, default=Path("datasets/.features"), help="default %(default)s")
    args = parser.parse_args()
    network = Lite0().to(memory_format=torch.channels_last)
    second, symmetric = lite0(network, LITE0_WEIGHTS.digest, "cpu")
    networks = Networks(second, None, symmetric)
    everything, thumbnails, test = read(args.patches, args.size)
    slides = np.unique(everything.groups[test])
    first = np.isin(everything.groups, slides[::2])
    train, fake, control = (everything.take(chosen) for chosen in (~test, test & first, test & ~first))
    table = {"nothing": fake.images}
    kinds = ("copy", "rotated copy", "colour-shifted copy", "half and half", "blend of two", "shifted copy")
    kinds += ("copy shifted both ways, off the grid", "copy turned by 20 degrees", "mirrored copy, 1.25 times as large")
    table |= {kind: planted_copies(fake.images, train.images, kind) for kind in kinds}
    table |= planted_faults(fake.images)
    for label in np.unique(fake.labels[fake.labels != ""])[:1]:
        members = np.flatnonzero(fake.labels == label)
        collapsed = fake.images.copy()
        noise = np.random.default_rng(0).normal(0, 4, collapsed[members].shape)
        collapsed[members] = soft(collapsed[members[np.arange(len(members)) % 3]] + noise)
        table[f"collapse of {label}"] = collapsed
    print(f"{len(train)} training, {len(control)} control, {len(fake)} played as generated, {args.size} pixels")
    for name, images in table.items():
        played = ImageSet(images, fake.names, fake.labels, fake.providers, fake.groups)
        found = objections(train, thumbnails[~test], control, played, networks, args.cache)
        print(f"planted {name:36} named: {', '.join(sorted(found)) or '-'}", flush=True)
    alarms = 0
    for draw in range(args.draws):
        order = np.random.default_rng(draw).permutation(np.unique(everything.groups))
        count = len(order) // 5
        played, control, rest = (
            np.isin(everything.groups, part) for part in (order[:count], order[count : 2 * count], order[2 * count :])
        )
        sets = (everything.take(chosen) for chosen in (rest, control, played))
        train_set, control_set, played_set = sets
        found = objections(train_set, thumbnails[rest], control_set, played_set, networks, args.cache)
        alarms += bool(found)
        print(f"real slides, draw {draw}: {', '.join(sorted(found)) or '-'}", flush=True)
    print(f"false alarms: {alarms} of {args.draws}")


if __name__ == "__main__":
    cli.run(main)
