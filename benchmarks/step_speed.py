"""How fast is one training step, beside the machine's limit and beside a plain DCGAN?

    python benchmarks/step_speed.py [--sizes 64 128 256] [--batch_size 8] [--preset cpu|gpu|large] [--rounds 3]

In turns in one process: the plain DCGAN of PyTorch's examples (its layers and its loop, carried on to the size; 1.4 GFLOP for each
network at 256), ours, and the improved model at each resolution that it grows through. GFLOP are counted by PyTorch: convolutions
and matrix products, forward and backward, without the penalties of every eighth step, which its counter cannot follow. The limit
is the best rate of some ordinary 3x3 convolutions, forward and backward. The last line weighs the improved model's resolutions by
the images that a run of 200 epochs of 900 patches spends at each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import cli
from models.config import WIDTHS
from training.config import TrainConfig
from training.device import choose_device, describe
from training.dry_run import stages
from training.presets import networks, preset_for, training_defaults
from training.step import directly
from training.trainer import Trainer

SECONDS = 5.0
TURN = 16  # steps until windows and whole images have both had their penalties
IMAGES = 900 * 200


class PlainDcgan:
    """The well-known example as it stands: default layout, plain Adam, three passes of D a step, no average."""

    def __init__(self, size: int, device: torch.device):
        torch.manual_seed(0)
        widths = [32 * (size // 2 // side) * (2 if size == 64 else 1) for side in _sides(size)]
        g: list[nn.Module] = [nn.ConvTranspose2d(100, widths[0], 4, 1, 0, bias=False)]
        for before, after in zip(widths, [*widths[1:], 3], strict=True):
            g += [nn.BatchNorm2d(before), nn.ReLU(True), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        d: list[nn.Module] = [nn.Conv2d(3, widths[-1], 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        for before, after in zip(widths[:0:-1], widths[-2::-1], strict=True):
            d += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2, True)]
        self.g = nn.Sequential(*g, nn.Tanh()).to(device)
        self.d = nn.Sequential(*d, nn.Conv2d(widths[0], 1, 4, 1, 0, bias=False), nn.Sigmoid()).to(device)
        self.loss = nn.BCELoss()
        self.opt_g, self.opt_d = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (self.g, self.d))

    def step(self, real: torch.Tensor) -> None:
        ones, zeros = torch.ones(len(real), device=real.device), torch.zeros(len(real), device=real.device)
        self.d.zero_grad()
        self.loss(self.d(real).view(-1), ones).backward()
        fake = self.g(torch.randn(len(real), 100, 1, 1, device=real.device))
        self.loss(self.d(fake.detach()).view(-1), zeros).backward()
        self.opt_d.step()
        self.g.zero_grad()
        self.loss(self.d(fake).view(-1), ones).backward()
        self.opt_g.step()


def _sides(size: int) -> list[int]:
    return [4 * 2**k for k in range(size.bit_length() - 3)]


def plain(size: int, batch_size: int, device: torch.device) -> Callable[[], None]:
    network, real = PlainDcgan(size, device), torch.rand(batch_size, 3, size, size, device=device) * 2 - 1
    return lambda: network.step(real)


def ours(
    model: str,
    size: int,
    batch_size: int,
    device: torch.device,
    preset: str,
    images: int = 0,
    noise: bool | None = None,
    counted: bool = False,
) -> Callable[[], None]:
    """Whole steps of train.py, penalties, average and adaptive augmentation included, as they are at ``images`` images seen.

    noise: in the improved model's layers and with a wider head on pixels, None for the default. counted: steps that PyTorch can
    count the arithmetic of, without penalties and not recorded.
    """
    chosen = networks(model, size, 4, preset, layer_noise=noise)
    config = TrainConfig(
        "", "label", epochs=200, batch_size=batch_size, **training_defaults(model, None) | ({"r1": 0.0} if counted else {})
    )
    trainer = Trainer(chosen, config, list("abcd"), [1] * 4, 900, device)
    if counted:
        trainer.step.perform = directly
    side = chosen.image_size
    batch = torch.rand(batch_size, 3, side, side, device=device) * 2 - 1, torch.arange(batch_size, device=device) % 4
    trainer.images = images - images % batch_size

    def step() -> None:
        trainer.images = trainer.images if trainer.images < images + TURN * batch_size else images - images % batch_size
        trainer.train_on(*batch)

    return step


def rate(step: Callable[[], None], device: torch.device) -> float:
    """Steps per second; TURN at a time."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        for _ in range(TURN):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += TURN
    return done / (time.perf_counter() - start)


def gflop(step: Callable[[], None]) -> float:
    """GFLOP of a step, mean of TURN."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(TURN):
            step()
    return counter.get_total_flops() / (TURN * 1e9)


def peak(device: torch.device) -> float:
    """GFLOP/s of the best of some 3x3 convolutions, forward and backward, channels last."""
    best = 0.0
    for channels, side in ((64, 64), (128, 32), (256, 16)):
        layer = nn.Conv2d(channels, channels, 3, padding=1).to(device, memory_format=torch.channels_last)
        maps = torch.randn(16, channels, side, side, device=device).to(memory_format=torch.channels_last).requires_grad_()
        step = lambda: layer(maps).sum().backward()  # noqa: B023, E731 used at once
        best = max(best, gflop(step) * rate(step, device))
    return best


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", choices=(64, 128, 256), default=[64, 128, 256], help="sides in pixels, default all"
    )
    parser.add_argument("--batch_size", type=cli.positive_int, default=8, help="images a step, default %(default)s")
    parser.add_argument("--preset", choices=tuple(WIDTHS), help="size of the improved model's networks; default cpu, gpu on CUDA")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="the best counts, default %(default)s")
    args = parser.parse_args()
    device = choose_device("auto")
    preset = args.preset or preset_for(device)
    makers: dict[str, Callable[..., Callable[[], None]]] = {}
    for size in args.sizes:
        makers[f"{size} plain DCGAN"] = partial(plain, size, args.batch_size, device)
        machine = size, args.batch_size, device, preset
        makers[f"{size} dcgan"] = partial(ours, "dcgan", *machine)
        for start, _ in grown(size):
            makers[f"{size} improved from {start} images on"] = partial(ours, "improved", *machine, start + 100)
        makers[f"{size} the same without noise"] = partial(ours, "improved", *machine, start + 100, False)
    steps = {name: make() for name, make in makers.items()}
    work = {name: gflop(make() if "plain" in name else make(counted=True)) for name, make in makers.items()}
    best, limit = dict.fromkeys(steps, 0.0), 0.0
    for _ in range(args.rounds):
        limit = max(limit, peak(device))
        for name, step in steps.items():
            best[name] = max(best[name], rate(step, device))
    print(
        f"{describe(device)}, torch {torch.__version__}, preset {preset}, batch {args.batch_size}, best of {args.rounds}; "
        f"limit {limit:.0f} GFLOP/s"
    )
    print(f"{'':40}{'images/s':>10}{'GFLOP/image':>13}{'GFLOP/s':>9}{'of limit':>10}")
    for name, value in best.items():
        speed = value * work[name]
        print(f"{name:40}{value * args.batch_size:10.2f}{work[name] / args.batch_size:13.2f}{speed:9.1f}{speed / limit:10.2f}")
    for size in args.sizes:
        images = {name: value * args.batch_size for name, value in best.items() if name.startswith(f"{size} ")}
        seconds = sum((end - start) / images[f"{size} improved from {start} images on"] for start, end in grown(size))
        average, base = IMAGES / seconds, images[f"{size} plain DCGAN"]
        print(
            f"{size}: dcgan {images[f'{size} dcgan'] / base:.2f} times the plain one; improved, over its schedule, {average:.1f} "
            f"images/s, {average / base:.2f} times; 200 epochs of 900 take {seconds / 3600:.2f} h"
        )
    return 0


def grown(size: int) -> list[tuple[int, int]]:
    """(first image, image after the last) of each resolution of the improved model in a run of 200 epochs of 900 patches."""
    config = TrainConfig("", "label", epochs=200, **training_defaults("improved", None))
    trainer = Trainer(networks("improved", size, 4), config, list("abcd"), [1] * 4, 900, torch.device("cpu"))
    return stages(trainer)


if __name__ == "__main__":
    cli.run(main)
