"""Download 200 files through a server that fails one request in five, for 20 seeds and both ways.

    python benchmarks/download_chaos.py [--seeds 20] [--files 200]

Prints per way and seed: faults met, files whole, bytes received against bytes needed. Ends with 1 when a file is not whole or
more than 1.05 times the needed bytes were received. The server is tests/kaggle_server.py; nothing is fetched from Kaggle.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tifffile

from common import cli
from data import download
from data.download import Downloader
from data.kaggle import connect
from data.transfer import Line
from tests.kaggle_server import Fault, KaggleServer, Options

SHARE = 0.2
MOST_RECEIVED = 1.05


def competition(count: int, folder: Path) -> dict[str, bytes]:
    """Small slides of noise of 0.05 to 0.8 MB."""
    rng = np.random.default_rng(0)
    files = {"train.csv": b"image_id,data_provider,isup_grade,gleason_score\n"}
    for number in range(count):
        side = 128 * int(rng.integers(1, 5))
        tifffile.imwrite(folder / "x.tiff", rng.integers(0, 256, (side, side, 3), np.uint8), tile=(128, 128), photometric="rgb")
        files[f"train_images/slide{number:03d}.tiff"] = (folder / "x.tiff").read_bytes()
    return files


def failing(seed: int):
    """A server's fault function: one request in five fails, in a way drawn at random. Returns it and its list of faults."""
    rng, met = random.Random(seed), []

    def fault(request):
        if rng.random() >= SHARE:
            return None
        cut = int(rng.random() * request.length)
        choices = [Fault(429), Fault(429, "0"), Fault(503), Fault(how="reset"), Fault(how="close")]
        if request.kind == "storage":
            choices = [*choices[:3], Fault(403), Fault(after=cut), Fault(after=cut, how="reset"), Fault(after=0)]
        met.append(rng.choice(choices))
        return met[-1]

    return fault, met


def run(way: str, seed: int, files: dict[str, bytes]) -> tuple[int, int, float, float, float]:
    """(faults, whole files, received share, share that the server sent, seconds) of one download."""
    fault, met = failing(seed)
    with KaggleServer(files, Options(deflate=seed % 2 == 1), fault) as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(server.environment(), HOME=folder)
        line = Line(first_wait=0.005, longest_wait=0.05, tries=30)
        start = time.monotonic()
        kaggle = connect(line, print)
        downloader = Downloader(kaggle, line, Path(folder), workers=4)
        download.FEW_FILES = 0 if way == "bundle" else 10**9
        downloader.choose_way(len(files))
        for _ in downloader.fetch_all(kaggle.list_files()):
            pass
        seconds = time.monotonic() - start
        whole = sum((Path(folder) / name).read_bytes() == content for name, content in files.items())
        needed = sum(map(len, files.values()))
        return len(met), whole, line.received / needed, sum(server.sent.values()) / needed, seconds


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--seeds", type=cli.positive_int, default=20, help="runs of each way (default: 20)")
    parser.add_argument("--files", type=cli.positive_int, default=200, help="files of each run (default: 200)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = competition(args.files, Path(folder))
    print(f"{len(files)} files, {sum(map(len, files.values())) / 1e6:.1f} MB, one request in {1 / SHARE:.0f} fails")
    print(f"{'way':>7} {'seed':>4} {'faults':>6} {'whole':>9} {'received/needed':>16} {'sent/needed':>12} {'seconds':>8}")
    good, worst = True, 0.0
    for way in ("single", "bundle"):
        for seed in range(args.seeds):
            faults, whole, received, sent, seconds = run(way, seed, files)
            print(
                f"{way:>7} {seed:>4} {faults:>6} {whole:>5}/{len(files)} {received:>16.4f} {sent:>12.4f} {seconds:>8.1f}",
                flush=True,
            )
            good, worst = good and whole == len(files) and received <= MOST_RECEIVED, max(worst, received)
    print(f"worst received/needed {worst:.4f}, {'all files whole' if good else 'FAILED'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
