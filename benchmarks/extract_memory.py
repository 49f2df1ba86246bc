"""How much memory does extraction take: for one huge slide, and over thousands of small ones?

    python benchmarks/extract_memory.py [--slides 2000] [--workers 2] [--plot memory.png]

Draws a sparse slide of 100,000 x 100,000 pixels and a folder of small slides (one file under many names), runs
extract_patches.py on each and samples the memory (resident set) of all its processes. Prints the largest of any process, and the
largest worker's in each tenth of the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tifffile

from common import cli
from tests.conftest import draw_slide, tissue_texture, write_pyramid

ROOT = Path(__file__).resolve().parents[1]
SIDE, TILE = 100_352, 512  # pixels; a multiple of 16 tiles
TISSUE = ((1024 * 8, 1024 * 8), (1024 * 64, 1024 * 32))  # left, top of two pieces of 16 x 16 tiles, in level-0 pixels
PIECE = 16 * TILE


def write_huge(path: Path) -> None:
    """A pyramid in which only the tiles with tissue are stored, as some scanners write it."""
    tissue, glass = tissue_texture(TILE, TILE, 0), np.full((TILE, TILE, 3), 255, np.uint8)

    def tiles(step: int) -> Iterator[np.ndarray | None]:
        for y in range(0, SIDE // step, TILE):
            for x in range(0, SIDE // step, TILE):
                inside = any(left <= x * step < left + PIECE and top <= y * step < top + PIECE for left, top in TISSUE)
                yield tissue if inside else glass if x == y == 0 else None  # the writer wants to see one at first

    options = {"photometric": "rgb", "tile": (TILE, TILE), "compression": "jpeg", "dtype": np.uint8}
    options |= {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 4, 16):
            tiff.write(tiles(step), shape=(SIDE // step, SIDE // step, 3), subfiletype=int(step > 1), **options)


def write_many(folder: Path, count: int) -> None:
    """``count`` names of one slide of 1,024 pixels."""
    write_pyramid(folder / "slide0.tiff", draw_slide(0, 1024))
    for number in range(1, count):
        os.link(folder / "slide0.tiff", folder / f"slide{number}.tiff")


def resident(process: int) -> int:
    """Resident memory of a process in MB; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 10**6
    except OSError:
        return 0


def children(process: int) -> list[int]:
    """Direct children of a process."""
    try:
        return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def watched(slides: Path, home: Path, workers: int, patches: int) -> tuple[list[tuple[float, int, int]], str]:
    """Samples (seconds, MB of the main process, MB of the largest worker) of one extraction, and its last lines."""
    words = ["--data_dir", slides, "--output_dir", home / "patches", "--max_patches", patches, "--workers", workers]
    with open(home / "out.txt", "w") as out:
        run = subprocess.Popen([sys.executable, ROOT / "extract_patches.py", *map(str, words)], stdout=out, stderr=out)
        start, samples = time.perf_counter(), []
        while run.poll() is None:
            largest = max(map(resident, children(run.pid)), default=0)
            samples.append((time.perf_counter() - start, resident(run.pid), largest))
            time.sleep(0.1)
    text = (home / "out.txt").read_text().strip()
    if run.returncode:
        raise SystemExit(text)
    return samples, "; ".join(text.splitlines()[-3:-1])


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--slides", type=cli.positive_int, default=2000, help="small slides, default %(default)s")
    parser.add_argument("--workers", type=cli.positive_int, default=2, help="processes of the extraction, default %(default)s")
    parser.add_argument("--plot", type=Path, help="write a picture of memory over time here, default none")
    args = parser.parse_args()
    runs = {}
    for name in ("one slide of 100,352 x 100,352 pixels", f"{args.slides} slides of 1,024 x 1,024 pixels"):
        with tempfile.TemporaryDirectory() as home:
            slides = Path(home) / "slides"
            slides.mkdir()
            if name.startswith("one"):
                write_huge(slides / "huge.tiff")
            else:
                write_many(slides, args.slides)
            runs[name], said = watched(slides, Path(home), args.workers, 100_000)
        samples = np.array(runs[name])
        print(f"{name}: {said}")
        print(f"  largest: main process {samples[:, 1].max():.0f} MB, a worker {samples[:, 2].max():.0f} MB")
        tenths = [part[:, 2].max() for part in np.array_split(samples, 10) if len(part)]
        print("  largest worker in each tenth of the time, MB: " + " ".join(f"{value:.0f}" for value in tenths), flush=True)
    if args.plot:
        plot(runs, args.plot)
    return 0


def plot(runs: dict, path: Path) -> None:
    """Memory over time, a panel a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(runs), figsize=(11, 3.5))
    for panel, (name, samples) in zip(panels, runs.items(), strict=True):
        seconds, main_process, worker = np.array(samples).T
        panel.plot(seconds, worker, label="largest worker")
        panel.plot(seconds, main_process, label="main process")
        panel.set(title=name, xlabel="seconds", ylabel="MB", ylim=(0, None))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    cli.run(main)
