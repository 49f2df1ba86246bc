"""How near is extract_patches.py to the limits of decoder, encoder and file system, and how far ahead of other ways?

    python benchmarks/extract_speed.py --data_dir FOLDER_OF_SLIDES [--max_patches 500] [--rounds 3]

All in turns, one process each, on the same patches:
  decode     JPEG tiles that hold the patches, decoded once from memory: the limit of any reader
  encode     the patches as PNG, in memory; files: their content written to a folder; the three together: the floor of any stage
  read       our reader alone; and the same with OpenSlide
  stage      extract_patches.py as a user runs it, files written, with 1 and 2 workers; and with OpenSlide reading all
             (overview, masks, patches, overlay picture)
  scripts    what others do, without masks, blur and pen: with OpenSlide a thumbnail, a threshold, read_region on a grid; with
             PIL level 0 opened whole and cut on a grid; both write PNG with PIL's defaults
Prints patches per CPU-second (best of the rounds), and the ratios that the goals speak of. Nothing is deleted before the end:
ext4 looks long for an inode where files were deleted seconds ago.
"""

from __future__ import annotations

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
import openslide
import psutil
import tifffile
from PIL import Image

from common import cli
from common.pictures import png
from data import cutting
from data.manifest import Patch, read_manifest
from data.patches import ExtractSettings, extract
from data.slides import Slide, slide_files

SIZE = 256


def cpu_seconds() -> float:
    """Of this process and its children, ended or waiting for more to do."""
    times, living = os.times(), [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    mine = times.user + times.system + times.children_user + times.children_system
    return mine + sum(child.user + child.system for child in living)


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


def stage(slides: Path, count: int, workers: int, home: Path) -> int:
    with silence():
        settings = ExtractSettings(data_dir=slides, output_dir=new_folder(home) / "patches", max_patches=count, workers=workers)
        return len(extract(settings).patches)


def new_folder(home: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=home))


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


def chosen(slides: Path, count: int, home: Path) -> dict[Path, list[Patch]]:
    """The patches that extraction takes, by slide file, in the order in which they lie there."""
    found = defaultdict(list)
    files = {path.stem: path for path in files_of(slides)}
    folder = new_folder(home) / "patches"
    with silence():
        extract(ExtractSettings(data_dir=slides, output_dir=folder, max_patches=count, workers=0))
    for row in read_manifest(folder):
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


def pixels_of(places: dict[Path, list[Patch]]) -> list[np.ndarray]:
    found = []
    for path, rows in places.items():
        with Slide(path) as slide:
            found += [patch for _, patch in slide.patches(slide.reading(), [(row.x, row.y) for row in rows], SIZE)]
    return found


def write(contents: list[bytes], folder: Path) -> int:
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)
    return len(contents)


def by_pil(files: list[Path], count: int, home: Path) -> int:
    """What a short script does; stops after ``count`` patches, in the slides' order."""
    Image.MAX_IMAGE_PIXELS = None
    done, folder = 0, new_folder(home)
    for path in files:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        for y in range(0, pixels.shape[0] - SIZE + 1, SIZE):
            for x in range(0, pixels.shape[1] - SIZE + 1, SIZE):
                patch = pixels[y : y + SIZE, x : x + SIZE]
                if (patch.mean(axis=2) < 220).mean() > 0.5:
                    Image.fromarray(patch).save(folder / f"{done}.png")
                    done += 1
                    if done == count:
                        return done
    return done


def by_openslide(files: list[Path], count: int, home: Path) -> int:
    """The usual script with OpenSlide: tissue on a thumbnail, then read_region."""
    done, folder = 0, new_folder(home)
    for path in files:
        with openslide.OpenSlide(path) as slide:
            width, height = slide.dimensions
            thumbnail = np.asarray(slide.get_thumbnail((width // 16, height // 16)).convert("RGB"))
            tissue = thumbnail.mean(axis=2) < 220
            for y in range(0, height - SIZE + 1, SIZE):
                for x in range(0, width - SIZE + 1, SIZE):
                    if tissue[y // 16 : (y + SIZE) // 16, x // 16 : (x + SIZE) // 16].mean() > 0.5:
                        slide.read_region((x, y), 0, (SIZE, SIZE)).convert("RGB").save(folder / f"{done}.png")
                        done += 1
                        if done == count:
                            return done
    return done


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of slides")
    parser.add_argument("--max_patches", type=cli.positive_int, default=500, help="default %(default)s")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="the best counts, default %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        best, what = measure(args.data_dir, args.max_patches, args.rounds, Path(home))
    print(f"{what}, best of {args.rounds}")
    for name, (per_cpu, per_second) in best.items():
        print(f"{name:>33}: {per_cpu:7.0f} patches/CPU-s {per_second:7.0f} patches/s")
    ours = best["stage, ours, in one process"][0]
    floor = 1 / sum(1 / best[name][0] for name in ("decode limit", "encode", "files"))
    print(f"reading: {best['read, ours'][0] / best['decode limit'][0]:.2f} of the decode limit")
    print(f"reading: {best['read, ours'][0] / best['read, OpenSlide'][0]:.1f} times OpenSlide")
    print(f"stage:   {ours / floor:.2f} of the floor, decode, encode and files alone: {floor:.0f} patches/CPU-s")
    for name in ("stage, OpenSlide, in one process", "OpenSlide script", "PIL script"):
        print(f"stage:   {ours / best[name][0]:.1f} times {name}; the floor would be {floor / best[name][0]:.1f} times")
    print(f"stage:   {best['stage, ours, 2 workers'][1] / best['stage, ours, 1 worker'][1]:.2f} times faster with 2 workers")
    return 0


def measure(slides: Path, count: int, rounds: int, home: Path) -> tuple[dict[str, tuple[float, float]], str]:
    """Patches per CPU-second and per second of each way, and what they were measured on."""
    places = chosen(slides, count, home)
    tiles, pixels, total = tiles_of(places), pixels_of(places), sum(map(len, places.values()))
    contents = [png(patch) for patch in pixels]

    def slow_stage() -> int:
        with openslide_only():
            return stage(slides, count, 0, home)

    ways: dict[str, Callable[[], int]] = {
        "decode limit": lambda: decode(tiles, total),
        "encode": lambda: len([png(patch) for patch in pixels]),
        "files": lambda: write(contents, new_folder(home)),
        "read, ours": lambda: read(places, True),
        "read, OpenSlide": lambda: read(places, False),
        "stage, ours, in one process": lambda: stage(slides, count, 0, home),
        "stage, ours, 1 worker": lambda: stage(slides, count, 1, home),
        "stage, ours, 2 workers": lambda: stage(slides, count, 2, home),
        "stage, OpenSlide, in one process": slow_stage,
        "OpenSlide script": lambda: by_openslide(files_of(slides), count, home),
        "PIL script": lambda: by_pil(files_of(slides), count, home),
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, work in ways.items():
            made, cpu, wall = timed(work)
            before = best.get(name, (0.0, 0.0))
            best[name] = max(before[0], made / cpu), max(before[1], made / wall)
    return best, f"{len(places)} slides, {total} patches, {len(tiles)} JPEG tiles"


if __name__ == "__main__":
    cli.run(main)
