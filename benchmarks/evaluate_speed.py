"""How long does a whole evaluation take, and how much of that is the feature networks alone?

    python benchmarks/evaluate_speed.py --patches datasets/patches --images 1000

Takes real patches in place of generated ones: nothing in the evaluation depends on what it is shown. The cache starts empty, as in
a first evaluation, and is used again for the second figure.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from data.dataset import decode, list_patches
from data.holdout import train_and_held_out
from metrics import evaluation, turned_search
from metrics.copies import Gallery
from metrics.evaluation import Networks, Sets, assess
from metrics.features import extract, inception, lite0
from metrics.images import image_set, read_images
from metrics.pixel_search import SIDE
from models.features import LITE0_WEIGHTS, Lite0


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--patches", type=Path, default=Path("datasets/patches"), help="default %(default)s")
    parser.add_argument("--images", type=cli.positive_int, default=1000, help="generated images, default %(default)s")
    parser.add_argument("--size", type=cli.positive_int, default=64, help="side in pixels, default %(default)s")
    args = parser.parse_args()
    train_files, held_out_files = train_and_held_out(args.patches)

    def read(files, size=args.size):
        return read_images([args.patches / file.path for file in files], decode, size, "read")

    every = list_patches(args.patches)
    chosen = [every[index % len(every)] for index in range(args.images)]
    train, held_out, fake = (image_set(read(files), [f.label for f in files]) for files in (train_files, held_out_files, chosen))
    gallery = Gallery(read(train_files, SIDE), train.names, lambda index: train.images[index])
    network = Lite0().to(memory_format=torch.channels_last)
    networks = Networks(inception(), *lite0(network, LITE0_WEIGHTS.digest, "cpu"))
    inside = []

    def timed_extract(*arguments, **options):
        start = time.perf_counter()
        features = extract(*arguments, **options)
        inside.append(time.perf_counter() - start)
        return features

    evaluation.extract = timed_extract
    evaluation.turned_suspicion.__globals__["extract"] = turned_search.extract = timed_extract
    print(
        f"{len(fake)} generated, {len(train)} training, {len(held_out)} held-out, {args.size} px, {torch.get_num_threads()} threads"
    )
    alone = 128 / seconds(lambda: extract(fake.images[:128], networks.standard))
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first evaluation", "again, real features cached"):
            inside.clear()
            whole = seconds(lambda: assess(Sets(train, held_out, fake, gallery), networks, 0, cache=Path(cache)))
            share = sum(inside) / whole
            print(f"{name}: {whole:.0f} s, of which the networks {sum(inside):.0f} s ({share:.0%})")
    print(f"Inception alone: {alone:.1f} images/s")


if __name__ == "__main__":
    cli.run(main)
