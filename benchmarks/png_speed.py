"""What does one patch cost as a picture: milliseconds and size of each way to write it.

    python benchmarks/png_speed.py --patches datasets/patches [--count 110] [--rounds 3]

Encodes real patches in memory, one thread, best of the rounds.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imagecodecs
import numpy as np
from PIL import Image

from common import cli
from common.pictures import png
from data.cutting import encode
from data.dataset import list_patches

PNG = imagecodecs.PNG


def by_pil(rgb: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()


def by_libpng(rgb: np.ndarray) -> bytes:
    return imagecodecs.png_encode(rgb, level=1, strategy=PNG.STRATEGY.RLE, filter=PNG.FILTER.PAETH)


WAYS: dict[str, Callable[[np.ndarray], bytes]] = {
    "ours: up filter, igzip level 1": png,
    "libpng: Paeth's filter, run lengths": by_libpng,
    "PIL's default": by_pil,
    "WebP, lossless, fastest": lambda rgb: imagecodecs.webp_encode(rgb, lossless=True, method=0),
    "JPEG, quality 95, 4:4:4": lambda rgb: encode(rgb, ".jpg"),
}


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--patches", type=Path, required=True, help="folder of patches")
    parser.add_argument("--count", type=cli.positive_int, default=110, help="patches, default %(default)s")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="the best counts, default %(default)s")
    args = parser.parse_args()
    files = list_patches(args.patches)
    chosen = files[:: max(1, len(files) // args.count)][: args.count]
    pictures = [np.asarray(Image.open(args.patches / file.path).convert("RGB")) for file in chosen]
    for name, way in WAYS.items():
        best = float("inf")
        for _ in range(args.rounds):
            start = time.process_time()
            size = sum(len(way(picture)) for picture in pictures)
            best = min(best, time.process_time() - start)
        print(f"{name:38}{best / len(pictures) * 1e3:8.2f} ms{size / len(pictures) / 1024:8.1f} KiB")
    return 0


if __name__ == "__main__":
    cli.run(main)
