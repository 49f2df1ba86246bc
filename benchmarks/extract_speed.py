"""How near is extract_patches.py to the limit of the JPEG decoder, and how far ahead of other ways?

    python benchmarks/extract_speed.py --data_dir FOLDER_OF_SLIDES [--max_patches 500] [--rounds 3]

All in turns, one process each, on the same patches:
  decode     JPEG tiles that hold the patches, decoded once from memory: the limit of any reader
  read       our reader alone; and the same with OpenSlide
  stage      extract_patches.py as a user runs it, files written, with 1 and 2 workers; and with OpenSlide
  PIL        opens level 0 whole, cuts a grid, keeps patches that are not white, writes PNG with PIL's defaults
Prints patches per CPU-second (best of the rounds), and the ratios that the goals speak of.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from common import cli
from data import cutting
from data.manifest import Patch, read_manifest
from data.patches import ExtractSettings, extract
from data.slides import Slide, slide_files

SIZE = 256


def cpu_seconds() -> float:
    """Of this process and its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """(patches, CPU seconds, wall seconds)."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    count = work()
    return count, cpu_seconds() - cpu, time.perf_counter() - wall


@contextlib.contextmanager
def silence() -> Iterator[None]:
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def files_of(slides: Path) -> list[Path]:
    """Slides of a plain folder or of one that is laid out as PANDA."""
    return slide_files(slides / "train_images" if (slides / "train_images").is_dir() else slides)


def stage(slides: Path, count: int, workers: int) -> int:
    with tempfile.TemporaryDirectory() as home, silence():
        settings = ExtractSettings(data_dir=slides, output_dir=Path(home) / "patches", max_patches=count, workers=workers)
        return len(extract(settings).patches)


@contextlib.contextmanager
def openslide_only() -> Iterator[None]:
    """All slides that are opened in this process are read by OpenSlide. Worker processes would not know: use workers=0."""

    class Slow(Slide):
        def __init__(self, path: Path, fast: bool = True):
            super().__init__(path, fast=False)

    cutting.Slide = Slow
    try:
        yield
    finally:
        cutting.Slide = Slide


def chosen(slides: Path, count: int) -> dict[Path, list[Patch]]:
    """The patches that extraction takes, by slide file, in the order in which they lie there."""
    found = defaultdict(list)
    files = {path.stem: path for path in files_of(slides)}
    with tempfile.TemporaryDirectory() as home, silence():
        extract(ExtractSettings(data_dir=slides, output_dir=Path(home) / "patches", max_patches=count, workers=0))
        for row in read_manifest(Path(home) / "patches"):
            found[files[row.slide_id]].append(row)
    return {path: sorted(rows, key=lambda row: (row.y // 512, row.x, row.y)) for path, rows in found.items()}


def read(places: dict[Path, list[Patch]], fast: bool) -> int:
    for path, rows in places.items():
        with Slide(path, fast=fast) as slide:
            for _ in slide.patches(slide.reading(), [(row.x, row.y) for row in rows], SIZE):
                pass
    return sum(map(len, places.values()))


def tiles_of(places: dict[Path, list[Patch]]) -> list[tuple[bytes, dict]]:
    """Content of each JPEG tile under a patch, once, with what its decoder needs."""
    found = []
    for path, rows in places.items():
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            if not page.is_tiled or page.compression != tifffile.COMPRESSION.JPEG:
                continue
            wide, side = -(-page.imagewidth // page.tilewidth), page.tilewidth
            indices = {
                (y // page.tilelength) * wide + x // side
                for row in rows
                for y in (row.y, min(row.y + SIZE, page.imagelength) - 1)
                for x in (row.x, min(row.x + SIZE, page.imagewidth) - 1)
            }
            options = {"tables": page.jpegtables, "colorspace": page.photometric.name, "outcolorspace": "RGB"}
            for index in sorted(indices):
                tiff.filehandle.seek(page.dataoffsets[index])
                found.append((tiff.filehandle.read(page.databytecounts[index]), options))
    return found


def decode(tiles: list[tuple[bytes, dict]], count: int) -> int:
    for body, options in tiles:
        if imagecodecs.jpeg8_decode(body, **options).ndim != 3:
            raise AssertionError("the decoder gave no picture")
    return count


def by_pil(files: list[Path], count: int) -> int:
    """What a short script does; stops after ``count`` patches, in the slides' order."""
    Image.MAX_IMAGE_PIXELS = None
    done = 0
    with tempfile.TemporaryDirectory() as home:
        for path in files:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            for y in range(0, pixels.shape[0] - SIZE + 1, SIZE):
                for x in range(0, pixels.shape[1] - SIZE + 1, SIZE):
                    patch = pixels[y : y + SIZE, x : x + SIZE]
                    if (patch.mean(axis=2) < 220).mean() > 0.5:
                        Image.fromarray(patch).save(f"{home}/{done}.png")
                        done += 1
                        if done == count:
                            return done
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of slides")
    parser.add_argument("--max_patches", type=cli.positive_int, default=500, help="default %(default)s")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="the best counts, default %(default)s")
    args = parser.parse_args()
    slides, count = args.data_dir, args.max_patches
    places = chosen(slides, count)
    tiles, total = tiles_of(places), sum(map(len, places.values()))

    def slow_stage() -> int:
        with openslide_only():
            return stage(slides, count, 0)

    ways: dict[str, Callable[[], int]] = {
        "decode limit": lambda: decode(tiles, total),
        "read, ours": lambda: read(places, True),
        "read, OpenSlide": lambda: read(places, False),
        "stage, ours, in one process": lambda: stage(slides, count, 0),
        "stage, ours, 1 worker": lambda: stage(slides, count, 1),
        "stage, ours, 2 workers": lambda: stage(slides, count, 2),
        "stage, OpenSlide, in one process": slow_stage,
        "PIL script": lambda: by_pil(files_of(slides), count),
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(args.rounds):
        for name, work in ways.items():
            made, cpu, wall = timed(work)
            before = best.get(name, (0.0, 0.0))
            best[name] = max(before[0], made / cpu), max(before[1], made / wall)
    print(f"{len(places)} slides, {total} patches, {len(tiles)} JPEG tiles, best of {args.rounds}")
    for name, (per_cpu, per_second) in best.items():
        print(f"{name:>33}: {per_cpu:7.0f} patches/CPU-s {per_second:7.0f} patches/s")
    ours = best["stage, ours, in one process"][0]
    print(f"reading: {best['read, ours'][0] / best['decode limit'][0]:.2f} of the decode limit")
    print(f"reading: {best['read, ours'][0] / best['read, OpenSlide'][0]:.1f} times OpenSlide")
    print(f"stage:   {ours / best['stage, OpenSlide, in one process'][0]:.1f} times the OpenSlide-only way")
    print(f"stage:   {ours / best['PIL script'][0]:.1f} times the PIL script")
    print(f"stage:   {best['stage, ours, 2 workers'][1] / best['stage, ours, 1 worker'][1]:.2f} times faster with 2 workers")
    return 0


if __name__ == "__main__":
    cli.run(main)
