"""From a checkpoint to images. Image k follows from (seed, label, k) alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError
from common.labels import known
from common.pictures import grid, to_uint8
from common.seeding import derive_seed
from models import build_generator
from models.config import ModelConfig
from models.dcgan import from_legacy
from models.ema import calibrate_batch_norm
from training import checkpoint
from training.guard import DivergedError, check_finite

# Images pass the network in groups of this size, always full: the arithmetic of a convolution may depend on the size of its batch
# in the last bit, and image k must not depend on how many others were asked for.
CHUNK = 16
CALIBRATION_BATCHES = 4
GRID_COLUMNS = 8


def latent(config: ModelConfig, seed: int, label: str, index: int) -> Tensor:
    """z (latent_dim,) of image ``index`` of a label, standard normal."""
    generator = torch.Generator().manual_seed(derive_seed(seed, f"image {label}", index))
    return torch.randn(config.latent_dim, generator=generator)


@torch.no_grad()
def run_generator(generator: nn.Module, z: Tensor, labels: Tensor | None, device: torch.device) -> np.ndarray:
    """z (N, latent_dim), labels (N,) -> (N, S, S, 3) uint8, in full chunks."""
    results = []
    for start in range(0, len(z), CHUNK):
        part = torch.arange(start, start + CHUNK).clamp(max=len(z) - 1)
        images = generator(z[part].to(device), None if labels is None else labels[part].to(device))
        results.append(to_uint8(images)[: len(z) - start])
    return np.concatenate(results)


def calibrate(generator: nn.Module, config: ModelConfig, device: torch.device) -> None:
    """Give an averaged generator its batch-norm statistics, over latents that are always the same."""
    random = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        for _ in range(CALIBRATION_BATCHES):
            z = torch.randn(32, config.latent_dim, generator=random)
            labels = torch.randint(config.num_classes, (32,), generator=random) if config.num_classes else None
            yield z.to(device), None if labels is None else labels.to(device)

    calibrate_batch_norm(generator, batches())


def closed_walk(stops: Tensor, frames: int) -> Tensor:
    """Latents (len(stops) * frames, latent_dim) from each stop to the next and back to the first.

    Spherical interpolation (Shoemake 1985): normal latents lie close to a sphere, and straight lines would cut through its inside.
    """
    result = []
    for a, b in zip(stops, stops.roll(-1, 0), strict=True):
        angle = torch.acos(torch.clamp(torch.dot(a / a.norm(), b / b.norm()), -1.0, 1.0))
        shares = torch.arange(frames)[:, None] / frames
        result.append((torch.sin((1 - shares) * angle) * a + torch.sin(shares * angle) * b) / torch.sin(angle))
    return torch.cat(result)


class Sampler:
    """The averaged generator of a checkpoint.

    labels: names of its classes, [] when unconditional. image_size: side in pixels. guidance: how far the improved model's labels
    are moved apart. truncation: below 1 images are more typical and vary less. condition: what its classes are, see
    data.dataset.class_of. stain_normalize: how the patches that it learned from were brought to one stain. Raises UserError where
    there are no labels to move.
    """

    def __init__(
        self,
        generator: nn.Module,
        config: ModelConfig,
        labels: Sequence[str],
        counts: Sequence[int],
        device: torch.device,
        guidance: float = 0.0,
        truncation: float = 1.0,
        condition: str = "label",
        stain_normalize: str = "none",
    ):
        self.generator = generator.to(device).eval().requires_grad_(False)
        self.config, self.labels, self.device = config, list(labels), device
        self.image_size = config.output_size
        self._counts = list(counts)
        self.guidance, self.truncation = guidance, truncation
        self.condition, self.stain_normalize = condition, stain_normalize
        told_apart = [number for number, label in enumerate(self.labels) if known(label)]
        if guidance and (config.model != "improved" or len(told_apart) < 2):
            raise UserError("--guidance moves the improved model's labels apart, and this model has none to move; leave it out")
        if config.model == "improved":
            generator.steer(told_apart, guidance, truncation)

    def sample(self, count: int, seed: int, label: str | None = None, start: int = 0) -> np.ndarray:
        """(count, S, S, 3) uint8. ``label`` None: labels in the proportions of the training patches (one sequence, shuffled).

        Raises UserError for an unknown label.
        """
        if label is not None and (label or self.labels):
            self.number(label)
        return self._images([label] * count if label is not None else self._mixture(start, count, seed), seed, start)

    def labelled(self, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
        """``sample`` without a label, and the label of each image, "" when unconditional."""
        names = self._mixture(0, count, seed)
        return self._images(names, seed, 0), names

    def _images(self, names: Sequence[str], seed: int, start: int) -> np.ndarray:
        return self.render(torch.stack([latent(self.config, seed, name, start + k) for k, name in enumerate(names)]), names)

    def render(self, z: Tensor, names: Sequence[str]) -> np.ndarray:
        """z (N, latent_dim) and a label name for each ("" when unconditional) -> (N, S, S, 3) uint8."""
        labels = torch.tensor([self.number(name) for name in names]) if self.labels else None
        z = z if self.config.model == "improved" else z * self.truncation  # the baseline has no styles to truncate
        return run_generator(self.generator, z, labels, self.device)

    def walk(self, label: str, seed: int, stops: int, frames: int) -> Tensor:
        """Latents (stops * frames, latent_dim) of a closed walk between ``stops`` random images of a label."""
        z = closed_walk(torch.stack([latent(self.config, seed, f"walk {label}", stop) for stop in range(stops)]), frames)
        place = self.config.latent_dim - self.config.place_dim
        z[:, place:] = z[0, place:]  # counted in whole pixels: a film in which the place moves shakes
        return z

    def grid(self, labels: Sequence[str], seed: int) -> Image.Image:
        """A picture with a row of GRID_COLUMNS images for each label, or four rows for [], an unconditional model."""
        names = [name for name in labels or [""] * 4 for _ in range(GRID_COLUMNS)]
        z = torch.stack([latent(self.config, seed, name, place) for place, name in enumerate(names)])
        return grid(self.render(z, names), GRID_COLUMNS, labels)

    def number(self, label: str) -> int:
        """Number of a label. Raises UserError that lists the labels there are."""
        if label not in self.labels:
            raise UserError(f"label {label!r} is not one of this model's: {', '.join(self.labels) or 'none, it is unconditional'}")
        return self.labels.index(label)

    def _mixture(self, start: int, count: int, seed: int) -> list[str]:
        if not self.labels:
            return [""] * count
        shares = np.asarray(self._counts, dtype=float)
        shares = shares / shares.sum() if shares.sum() else np.full(len(self.labels), 1 / len(self.labels))
        edges = np.cumsum(shares)
        chances = [derive_seed(seed, "label", start + k) / 2**63 for k in range(count)]
        return [self.labels[min(int(np.searchsorted(edges, chance, side="right")), len(edges) - 1)] for chance in chances]


def _unfit(path: Path, why: str) -> UserError:
    return UserError(f"{path} does not fit its own description ({why}); use another checkpoint")


def _described(path: Path, state: dict) -> tuple[ModelConfig, dict, list[str], list[int], dict]:
    """Of a checkpoint of train.py: the networks, weights, classes, the patches of each class, and the settings of the run."""
    try:
        config, weights = ModelConfig.from_dict(state["model"]), state["ema"]
        classes, counts, settings = list(state["classes"]), list(state["class_counts"]), dict(state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise _unfit(path, f"{error} is missing" if isinstance(error, KeyError) else str(error)) from error
    if not len(classes) == len(counts) == config.num_classes:
        raise _unfit(path, f"{len(classes)} classes for {config.num_classes}")
    for name in classes:
        if not _is_name(name):
            raise _unfit(path, f"{name!r} is not the name of a class")
    return config, weights, classes, counts, settings


def _is_name(name: object) -> bool:
    """Whether a folder of this name lies where it is made: checkpoints come from strangers, too."""
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else [""]
    return not {"", ".", ".."} & set(parts) and "\0" not in name


def load_sampler(path: Path, device: torch.device, guidance: float = 0.0, truncation: float = 1.0) -> Sampler:
    """Sampler of a checkpoint of train.py, or of a plain DCGAN generator state_dict. Raises UserError when it is neither."""
    state = checkpoint.load(path)
    if checkpoint.is_plain_state_dict(state):
        config, weights, _ = from_legacy(state, None)
        classes, counts, settings = [], [], {}
    else:
        config, weights, classes, counts, settings = _described(path, state)
    generator = build_generator(config)
    try:
        generator.load_state_dict(weights)
    except RuntimeError as error:
        raise _unfit(path, str(error).splitlines()[0]) from error
    try:
        check_finite({"ema": weights}, ["ema"])
    except DivergedError as error:
        raise UserError(f"{path} is of a run that had diverged: {error}; use an earlier checkpoint") from error
    learned = {name: str(settings[name]) for name in ("condition", "stain_normalize") if name in settings}
    return Sampler(generator, config, classes, counts, device, guidance, truncation, **learned)
