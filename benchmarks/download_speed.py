"""Speed of download_panda_data.py with one connection against Kaggle's own client, on the same local server without faults.

    python benchmarks/download_speed.py [--files 20] [--megabytes 20] [--rounds 3] [--line 0]

Each is a process of its own that fetches the same slides, timed from start to end, in turn. Kaggle's client neither checks
what it fetched nor flushes it to the disk; ours does both. The server is tests/kaggle_server.py, in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tifffile

from common import cli
from tests.kaggle_server import KaggleServer, Options

ROOT = Path(__file__).resolve().parents[1]
PLAIN = """
import sys, kaggle
from data.panda import COMPETITION
for name in sys.argv[2:]:
    kaggle.api.competition_download_file(COMPETITION, name, path=sys.argv[1], quiet=True)
"""
OURS = """
import sys
from data import download
download.FEW_FILES = int(sys.argv.pop(1))
import download_panda_data as script
script.cli.run(script.main)
"""


def serve(files: dict[str, bytes], rate: float | None, pipe) -> None:
    with KaggleServer(files, Options(rate=rate)) as server:
        for name in [*files, "bundle"]:
            server.content(name)  # checksums and the zip are made before anybody is timed
        pipe.send(server.environment())
        pipe.recv()


def competition(count: int, megabytes: float) -> dict[str, bytes]:
    """Slides of noise."""
    rng = np.random.default_rng(0)
    side = int((megabytes * 1e6 / 3) ** 0.5) // 256 * 256
    rows = ["image_id,data_provider,isup_grade,gleason_score"]
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            rows.append(f"slide{number},radboud,0,negative")
            path = Path(folder) / "x.tiff"
            tifffile.imwrite(path, rng.integers(0, 256, (side, side, 3), np.uint8), tile=(256, 256), photometric="rgb")
            files[f"train_images/slide{number}.tiff"] = path.read_bytes()
    return {"train.csv": "\n".join(rows).encode(), **files}


def timed(command: list[str], environment: dict[str, str], folder: Path) -> tuple[float, float]:
    """(seconds, CPU seconds) of one process that fetches into ``folder``, which is removed again."""
    start, before = time.monotonic(), os.times()
    subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.monotonic() - start, os.times()
    shutil.rmtree(folder)
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--files", type=cli.positive_int, default=20, help="slides (default: 20)")
    parser.add_argument("--megabytes", type=cli.positive_float, default=20.0, help="of each slide (default: 20)")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="repetitions; the best counts (default: 3)")
    parser.add_argument(
        "--line", type=cli.non_negative_float, default=0.0, help="megabytes a second of a connection (default: 0, no limit)"
    )
    args = parser.parse_args()
    files = competition(args.files, args.megabytes)
    total = sum(map(len, files.values())) / 1e6
    here, there = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(files, args.line * 1e6 or None, there), daemon=True)
    server.start()
    environment = {**os.environ, **here.recv(), "PYTHONPATH": str(ROOT)}
    ours = [sys.executable, "-c", OURS]
    ways = {
        "Kaggle's client": lambda to: [sys.executable, "-c", PLAIN, str(to), *files],
        "ours, single files": lambda to: [*ours, "1000000", "--data_dir", str(to), "--workers", "1"],
        "ours, bundle": lambda to: [*ours, "0", "--data_dir", str(to), "--workers", "1"],
    }
    seconds = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, command in ways.items():
            with tempfile.TemporaryDirectory() as home:
                target = Path(home) / "target"
                target.mkdir()
                seconds[name].append(timed(command(target), {**environment, "HOME": home}, target))
    here.send("end")
    line = f"{args.line:.0f} MB/s" if args.line else "without limit"
    print(f"{len(files)} files, {total:.0f} MB, line {line}, best of {args.rounds}")
    for name, times in seconds.items():
        best, cpu = min(wall for wall, _ in times), min(cpu for _, cpu in times)
        shown = ", ".join(f"{wall:.2f}" for wall, _ in times)
        print(f"{name:>20}: {best:6.2f} s, {total / best:7.1f} MB/s, {cpu:5.2f} CPU s   (all: {shown} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
