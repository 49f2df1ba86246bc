"""Train a small improved model and a DCGAN for some steps in however many processes torchrun starts, and print their statistics.

torchrun --nproc_per_node 2 tests/distributed_losses.py 50
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.config import dcgan_config, improved_config
from training import processes
from training.config import TrainConfig
from training.presets import training_defaults
from training.trainer import Trainer

BATCH = 16


def statistics(model: str, steps: int, together: processes.Processes) -> list[list[float]]:
    """STATISTICS of each step on the whole batch."""
    networks = dcgan_config(64, 3)
    if model == "improved":
        networks = improved_config(64, 3, discriminator="projected", grow_from=32, window=32)
        networks = replace(networks, g_channels=(8, 8, 8, 4), d_channels=(8,))
    else:
        networks = replace(networks, g_channels=(8, 8, 8, 8), d_channels=(8, 8, 8, 8))
    grading = 1.0 if model == "improved" else 0.0
    config = TrainConfig("", "label", batch_size=BATCH, grow_images=200, grading=grading, **training_defaults(model, None))
    trainer = Trainer(networks, config, list("abc"), [9, 9, 9], 10_000, torch.device("cpu"), together)
    trainer.strength, rows = 0.3, []
    for step in range(steps):
        noise = torch.Generator().manual_seed(step)
        real = torch.nn.functional.avg_pool2d(torch.rand(BATCH, 3, 64, 64, generator=noise), 5, 1, 2) * 2 - 1
        mine = slice(together.rank, None, together.world)
        rows.append(trainer.train_on(real[mine], (torch.arange(BATCH) % 3)[mine]).tolist())
    return rows


def both_models(steps: int, together: processes.Processes) -> dict[str, list[list[float]]]:
    """Statistics of each, to be asked for in float64: in float32 rounding grows to percents within 20 steps."""
    return {model: statistics(model, steps, together) for model in ("improved", "dcgan")}


def main() -> None:
    together, _ = processes.join(torch.device("cpu"))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = both_models(int(sys.argv[1]), together)
    if together.first:
        print(json.dumps(found))
    processes.leave(together)


if __name__ == "__main__":
    main()
