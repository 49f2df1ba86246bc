"""How does cost grow with the number of patches?

    python benchmarks/growth.py [--counts 1000 10000 100000] [--side 32]
    python benchmarks/growth.py --shards --counts 10000 1000000 --side 16

Draws small synthetic patches with a manifest, then measures, each in a process of its own: reading the manifest; opening the
patches for the first time (decoding them into the cache) and again; the order of one epoch; check_data.py; and train.py from its
start to its first step, where it decodes the held-out patches too, and once more with all caches in place. With --shards the
patches lie in tar files, which need no cache and whose check is left out. Prints seconds and the largest memory of each, and how
each grew.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.pictures import png
from data.manifest import Patch, write_manifest
from data.shards import is_sharded, write_shards

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("benign", "gleason3", "gleason4", "gleason5")
IMAGE_SIZE = 64
# Side in pixels that the training below reads its patches at, as models.config.painted_size says; to import that here would bring
# PyTorch into this process, whose memory Linux counts as that of the programs it starts.
READ_AT = 128
OPEN = f"from data.dataset import PatchDataset; d = PatchDataset(__import__('pathlib').Path({{0!r}}), {READ_AT}, 'label')"
STAGES = {
    "read the manifest": "from data.manifest import read_manifest; read_manifest({0!r})",
    "open, first time": OPEN,
    "open again": OPEN,
    "order of one epoch": OPEN
    + "; from data.order import BalancedOrder, BatchesFrom; list(BatchesFrom(BalancedOrder(d.groups(), 0), 8, 0, len(d)))",
}

SHARD_STAGES = {
    "read the index": "from data.shards import Shards; Shards({0!r})",
    "open": OPEN,
    "order of one epoch": STAGES["order of one epoch"],
}


def patches(count: int, side: int) -> Iterator[tuple[Patch, bytes]]:
    """``count`` rows and files of patches of noise in the colours of tissue, 50 a slide, from two providers."""
    random = np.random.default_rng(0)
    for number in range(count):
        slide, label = f"slide{number // 50}", LABELS[number % 4]
        path = f"{label}/{slide}_{number}_0.png"
        pixels = random.integers(0, 120, (side, side, 3), dtype=np.uint8) + np.uint8([110, 40, 110])
        provider, split = ("karolinska", "radboud")[number // 50 % 2], "test" if number >= 0.86 * count else "train"
        yield Patch(path, slide, provider, 3, "4+3", label, number, 0, 0, 0.5, 0.9, 100.0, split), png(pixels)


def draw(folder: Path, count: int, side: int, sharded: bool) -> None:
    """A folder of patches with its manifest, or of shards."""
    if sharded:
        write_shards(folder, patches(count, side), "")
        return
    rows = []
    for label in LABELS:
        (folder / label).mkdir(parents=True)
    for row, content in patches(count, side):
        (folder / row.path).write_bytes(content)
        rows.append(row)
    write_manifest(folder, rows)


def measured(words: list[str], until: Path | None = None) -> tuple[float, int]:
    """(seconds, largest memory in MB) of a command; with ``until`` only up to the moment when that file is there."""
    start = time.perf_counter()
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    while until is not None and not until.exists() and process.poll() is None:
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if until is not None:
        process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    if until is None and os.waitstatus_to_exitcode(status) > 1:
        raise SystemExit(f"{' '.join(words)} failed")
    return time.perf_counter() - start if until is None else seconds, round(usage.ru_maxrss / 1e3)


def stages(folder: Path, home: Path) -> dict[str, tuple[float, int]]:
    """Seconds and memory of each stage on one folder of patches."""
    chosen = SHARD_STAGES if is_sharded(folder) else STAGES
    found = {name: measured([sys.executable, "-c", code.format(str(folder))]) for name, code in chosen.items()}
    if not is_sharded(folder):
        words = [sys.executable, "check_data.py", "--patches", str(folder), "--out", str(home / "check")]
        found["check_data.py"] = measured(words)
    for name in ("train.py to its first step", "the same once more"):
        run = home / name
        where = ["--checkpoint_dir", str(run), "--log_dir", str(run / "logs")]
        words = [sys.executable, "train.py", "--patches", str(folder), "--image_size", str(IMAGE_SIZE), "--eval_every", "0", *where]
        found[name] = measured(words, run / "latest.pt")
    return found


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--counts", type=cli.positive_int, nargs="+", default=[1000, 10_000, 100_000], help="of patches, default 1000 10000 100000"
    )
    parser.add_argument("--side", type=cli.positive_int, default=32, help="of a patch in pixels, default %(default)s")
    parser.add_argument("--shards", action="store_true", help="patches in tar shards, default: in files")
    args = parser.parse_args()
    nothing = measured([sys.executable, "-c", "import data.dataset"])
    print(f"{'starting Python and its libraries':36}{nothing[0]:9.1f} s{nothing[1]:7} MB", flush=True)
    tables = {}
    for count in args.counts:
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home) / "patches"
            # In a process of its own: Linux counts the memory of the process that starts a program as that program's.
            drawing = multiprocessing.get_context("spawn").Process(target=draw, args=(folder, count, args.side, args.shards))
            drawing.start()
            drawing.join()
            tables[count] = stages(folder, Path(home))
        for name, (seconds, megabytes) in tables[count].items():
            print(f"{count:>8} {name:27}{seconds:9.1f} s{megabytes:7} MB", flush=True)
    first, last = min(tables), max(tables)
    for name in tables[first]:
        growth = tables[last][name][0] / tables[first][name][0]
        print(f"{name:36}{growth:9.1f} times the seconds for {last / first:.0f} times the patches")
    return 0


if __name__ == "__main__":
    cli.run(main)
