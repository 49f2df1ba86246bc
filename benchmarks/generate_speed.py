"""How near is generate.py to the speed of its network alone?

    python benchmarks/generate_speed.py [--sizes 64 256] [--models improved dcgan] [--images 320] [--rounds 3]

In turns in one process, networks with the weights they start with (their arithmetic is the same): the generator's forward pass
alone on latents that lie in memory, in groups of as many as generate.py takes; and generate.py's whole work: latents, network, PNG,
files and manifest. Prints images per second and the ratio; on a CPU also the ratio in CPU-seconds, which holds where others use
the cores too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import generate
from common import cli
from training import checkpoint
from training.config import TrainConfig
from training.device import choose_device, describe
from training.presets import networks, training_defaults
from training.processes import Processes
from training.sampling import CHUNK, Sampler, load_sampler
from training.trainer import Trainer

LABELS = ["benign", "gleason3", "gleason4", "gleason5"]


def new_checkpoint(model: str, size: int, path: Path) -> None:
    config = TrainConfig("", "label", epochs=1, batch_size=8, **training_defaults(model, None))
    trainer = Trainer(networks(model, size, len(LABELS)), config, LABELS, [1] * len(LABELS), 8, torch.device("cpu"))
    checkpoint.save(path, trainer.state())


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """By the clock, and of the CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


@torch.no_grad()
def network_alone(sampler: Sampler, images: int) -> None:
    z = torch.randn(CHUNK, sampler.config.latent_dim).to(sampler.device)
    labels = (torch.arange(CHUNK) % len(LABELS)).to(sampler.device)
    for _ in range(images // CHUNK):
        sampler.generator(z, labels)


def measure(model: str, size: int, images: int, rounds: int, device: torch.device) -> str:
    """One line of the table: the best of the rounds of each way."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "G_final.pt"
        new_checkpoint(model, size, path)
        sampler = load_sampler(path, device)

        def whole(number: int) -> None:
            folder = Path(home) / str(number)
            args = argparse.Namespace(checkpoint=path, label=None, num=images, out=folder, seed=0, best_of=1)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                generate.write(sampler, args, Processes())

        network_alone(sampler, CHUNK)
        alone, stage = [], []
        for number in range(rounds):
            alone.append(seconds(lambda: network_alone(sampler, images), device))
            stage.append(seconds(lambda: whole(number), device))  # noqa: B023 used at once
    (network, network_cpu), (all_of_it, all_cpu) = (map(min, zip(*found, strict=True)) for found in (alone, stage))
    of_cpu = f"{network_cpu / all_cpu:14.2f}" if device.type == "cpu" else ""
    return f"{size:>5} {model:>10}{images / network:14.1f}{images / all_of_it:14.1f}{network / all_of_it:8.2f}{of_cpu}"


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", choices=(64, 128, 256), default=[64, 256], help="sides in pixels, default 64 256"
    )
    parser.add_argument("--models", nargs="+", choices=("improved", "dcgan"), default=["improved", "dcgan"], help="default both")
    parser.add_argument("--images", type=cli.positive_int, default=320, help="a multiple of 64, default %(default)s")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="the best counts, default %(default)s")
    args = parser.parse_args()
    if args.images % (CHUNK * len(LABELS)):
        parser.error(f"--images must be a multiple of {CHUNK * len(LABELS)}: full groups of each label")
    device = choose_device("auto")
    print(f"{describe(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, images/s")
    print(f"{'':16}{'network alone':>14}{'generate.py':>14}{'ratio':>8}{'in CPU-seconds':>16}")
    for size in args.sizes:
        for model in args.models:
            print(measure(model, size, args.images, args.rounds, device), flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
