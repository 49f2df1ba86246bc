"""Kill each stage with SIGKILL at random moments, start it again until it is done, and compare with an undisturbed run.

    python benchmarks/kills.py [--kills 50] [--stages train extract generate download] [--seed 0]

Training: the weights of G_final.pt are those of the undisturbed run bit for bit, metrics.jsonl has each row once. Extraction,
generation and download: the files are the same. Prints a table; ends with 1 when anything was lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import cli
from tests.conftest import write_noise_patches, write_panda_folder
from tests.kaggle_server import KaggleServer
from training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
STAGES = ("train", "extract", "generate", "download")
TIMED = {"downloads.csv"}  # says when each file came


@dataclass
class Stage:
    """command: its words in a folder, given what is there already. result: what must be equal."""

    name: str
    command: Callable[[Path], list]
    result: Callable[[Path], object]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, folder: Path, patience: float | None = None) -> int | None:
        """Exit code; None when it was killed after ``patience`` seconds."""
        folder.mkdir(exist_ok=True)
        words = [sys.executable, *map(str, self.command(folder))]
        with open(folder.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(words, cwd=folder, env=ENVIRONMENT | self.environment, stdout=log, stderr=log)
            try:
                return process.wait(patience)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return None


def files_in(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Digests of the files with these endings."""
    found = (path for path in folder.rglob("*") if path.suffix in suffixes and not path.name.startswith("."))
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(found)
        if path.name not in TIMED
    }


def weights(folder: Path) -> dict[str, str]:
    """Digests of all tensors of a finished training, and the rows of its metrics, which must be whole and in order."""
    state = checkpoint.load(folder / "checkpoints" / checkpoint.FINAL)
    digests = {
        f"{part}.{name}": hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for part in ("generator", "discriminator", "ema")
        for name, value in state[part].items()
    }
    rows = [json.loads(line)["images"] for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    if rows != sorted(rows):
        raise AssertionError(f"metrics.jsonl is out of order: {rows}")
    return digests


def stages(home: Path, names: list[str], epochs: int) -> Iterator[Stage]:
    patches = write_noise_patches(home / "patches", 24, ("benign", "gleason4"))
    often = ("--save_every", 1, "--sample_every", 1, "--eval_every", 0, "--keep", 2)

    def train(folder: Path) -> list:
        go_on = ["--resume"] if list((folder / "checkpoints").glob("*.pt")) else []
        where = ["--patches", patches, "--device", "cpu", "--workers", 0]
        return [
            ROOT / "train.py",
            *where,
            "--model",
            "dcgan",
            "--image_size",
            64,
            "--batch_size",
            4,
            "--epochs",
            epochs,
            *often,
            *go_on,
        ]

    if "train" in names or "generate" in names:
        yield Stage("train", train, weights)
    slides = home / "panda"
    if {"extract", "download"} & set(names):
        write_panda_folder(slides, side=2048)
    if "extract" in names:
        words = ["--data_dir", slides, "--output_dir", "patches", "--max_patches", 150, "--workers", 1]
        yield Stage(
            "extract",
            lambda _: [ROOT / "extract_patches.py", *words],
            lambda folder: files_in(folder / "patches", (".png", ".csv")),
        )
    if "generate" in names:
        final = home / "train" / "plain" / "checkpoints" / checkpoint.FINAL
        words = ["--checkpoint", final, "--num", 400, "--out", "synthetic", "--device", "cpu"]
        yield Stage(
            "generate", lambda _: [ROOT / "generate.py", *words], lambda folder: files_in(folder / "synthetic", (".png", ".csv"))
        )
    if "download" in names:
        files = {path.relative_to(slides).as_posix(): path.read_bytes() for path in slides.rglob("*") if path.is_file()}
        with KaggleServer(files) as server:
            server.options.rate = 400_000
            words = ["--data_dir", "panda", "--workers", 2]
            environment = server.environment() | {"HOME": str(home)}
            yield Stage(
                "download",
                lambda _: [ROOT / "download_panda_data.py", *words],
                lambda folder: files_in(folder / "panda", (".tiff", ".csv")),
                environment,
            )


def torment(stage: Stage, home: Path, kills: int, chance: random.Random) -> tuple[int, int, int]:
    """(kills, runs brought to their end, runs whose result differs or that refused to go on)."""
    start = time.monotonic()
    if stage.run(home / "plain") != 0:
        raise SystemExit(f"the undisturbed {stage.name} failed, see {home / 'plain.log'}")
    whole = time.monotonic() - start
    wanted, killed, ends, losses = stage.result(home / "plain"), 0, 0, 0
    while killed < kills or ends == 0:
        folder, mine = home / f"killed{ends}", 0
        while True:
            calm = killed >= kills or mine >= 12  # let it come to an end
            code = stage.run(folder, None if calm else chance.uniform(0.3, 1.0) * whole)
            if code is None:
                killed, mine = killed + 1, mine + 1
                continue
            break
        ends += 1
        lost = code != 0 or stage.result(folder) != wanted
        losses += lost
        if lost:
            print(f"{stage.name}: {folder} ended with {code}, see {folder}.log", flush=True)
    return killed, ends, losses


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--kills", type=cli.positive_int, default=50, help="of each stage (default: 50)")
    parser.add_argument("--epochs", type=cli.positive_int, default=12, help="of the training (default: 12)")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the moments of the kills (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance, total = random.Random(args.seed), 0
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for stage in stages(home, args.stages, args.epochs):
            (home / stage.name).mkdir()
            kills = args.kills if stage.name in args.stages else 0
            killed, ends, losses = torment(stage, home / stage.name, kills, chance)
            print(f"{stage.name:9} {killed:3} kills, {ends} runs brought to their end, {losses} losses", flush=True)
            total += losses
    return 1 if total else 0


if __name__ == "__main__":
    cli.run(main)
