"""What slides, patches and shards on S3 cost beside a local disk, with a server on this very machine that shares its cores.

    python benchmarks/s3_speed.py --data_dir datasets/panda [--rounds 2] [--workers 1]

Times extract_patches.py from local folder to local folder and from s3:// to s3:// by turns, then again with --shards, which only
packs, and compares what they made; then train.py from its start to its first step: from local shards, from s3:// for the first time
(they are copied) and again. CPU seconds are of the program and, behind the plus, of the server.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import requests

from common import cli, storage
from common.storage import Place, Remote
from data.shards import checksums

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "bench"


def start_server() -> psutil.Process:
    """moto's S3 server in a process of its own; the environment names it from then on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for _ in range(100):
        try:
            requests.put(f"{url}/{BUCKET}", timeout=5).raise_for_status()
            return server
        except requests.ConnectionError:
            time.sleep(0.2)
    raise SystemExit("moto's server does not start")


def extraction(data: Place, home: Place, server: psutil.Process, *more: object) -> tuple[float, float, float]:
    """Seconds, CPU seconds of the program, CPU seconds of the server, of one extract_patches.py."""
    words = ["--data_dir", data, "--output_dir", home / "patches", *more]
    start, own, its = time.perf_counter(), os.times(), sum(server.cpu_times()[:2])
    run = [sys.executable, "extract_patches.py", *map(str, words)]
    subprocess.run(run, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    now = os.times()
    used = now.children_user + now.children_system - own.children_user - own.children_system
    return time.perf_counter() - start, used, sum(server.cpu_times()[:2]) - its


def by_turns(what: str, pairs: tuple, server: psutil.Process, *more: object) -> None:
    """Run and print one extraction from each (slides, home), the local one first."""
    local, remote = (extraction(*pair, server, *more, *(["--shards", pair[1] / "shards"] * (what == "pack"))) for pair in pairs)
    cpu = f"CPU {local[1]:.1f} s, {remote[1]:.1f} + {remote[2]:.1f} s"
    print(f"{what:8} local {local[0]:.1f} s, s3 {remote[0]:.1f} s, {remote[0] / local[0]:.2f} times; {cpu}", flush=True)


def first_step(patches: Place, home: Path, name: str) -> float:
    """Seconds of train.py to its first checkpoint, which it writes after its first step."""
    where = ["--checkpoint_dir", home / name / "checkpoints", "--log_dir", home / name / "logs"]
    words = ["--patches", patches, "--image_size", 64, "--eval_every", 0, "--workers", 0, "--device", "cpu", *where]
    start = time.perf_counter()
    run = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)], cwd=home, stdout=subprocess.DEVNULL)
    while not (home / name / "checkpoints" / "latest.pt").exists() and run.poll() is None:
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    run.send_signal(signal.SIGTERM)
    run.wait()
    return seconds


def put(folder: Path, target: Remote) -> int:
    """Upload a folder; its bytes."""
    files = {path: target / path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    storage.store(files)
    return sum(path.stat().st_size for path in files)


def compare(data: Path, rounds: int, workers: int, home: Path, server: psutil.Process) -> None:
    size = put(data, Remote(f"s3://{BUCKET}/panda"))
    print(f"slides and masks of {size / 1e6:.0f} MB, {workers} worker(s)")
    for number in range(rounds):
        here, there = home / f"run{number}", Remote(f"s3://{BUCKET}/run{number}")
        pairs = (data, here), (Remote(f"s3://{BUCKET}/panda"), there)
        by_turns("extract", pairs, server, "--workers", workers)
        by_turns("pack", pairs, server, "--workers", workers)
        (home / "index").mkdir(exist_ok=True)
        same = checksums(storage.brought(there / "shards" / "patches.parquet", home / "index").parent) == checksums(here / "shards")
        print(f"the same shards: {same}")
    for name, patches in (("local shards", here / "shards"), ("s3, first time", there / "shards"), ("s3, again", there / "shards")):
        print(f"train.py to its first step, {name}: {first_step(patches, home, name):.1f} s", flush=True)


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--data_dir", type=Path, default=Path("datasets/panda"), help="slides in PANDA's layout, default %(default)s"
    )
    parser.add_argument("--rounds", type=cli.positive_int, default=2, help="default %(default)s")
    parser.add_argument("--workers", type=cli.positive_int, default=1, help="of the extraction, default %(default)s")
    args = parser.parse_args()
    cli.existing_folder(args.data_dir, "slides", "name a folder with --data_dir")
    server = start_server()
    try:
        with tempfile.TemporaryDirectory() as home:
            compare(args.data_dir.resolve(), args.rounds, args.workers, Path(home), server)
    finally:
        server.terminate()
        server.wait()
    return 0


if __name__ == "__main__":
    cli.run(main)
