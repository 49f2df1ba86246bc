"""What a run is when its flags do not say: by model, by objective, by machine."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import UserError
from common.progress import say
from models.config import WIDTHS, ModelConfig, dcgan_config, improved_config, painted_size
from training import options
from training.config import TrainConfig
from training.device import describe
from training.trainer import Trainer

DEFAULT_MODEL = "improved"
DEFAULT_SIZE = 256
_IMPROVED = {
    "objective": "non_saturating",
    "r1": 0.5,
    "lr_g": 2e-3,
    "lr_d": 5e-4,
    "label_smoothing": 0.0,
    "perceptual": 3.0,
    "adaptive": ["translation", "color", "stain"],
    "warmup_images": 2_000,
    "betas": [0.0, 0.99],
}
LARGEST_MEASURED = 32  # batch size up to which larger batches learn at larger rates: beyond, nobody has tried
# A penalty belongs to some objectives: Gulrajani et al. 2017; R3GAN 2024; a hinge with spectral norm needs none.
_PENALTIES = {
    "wgan": {"r1": 0.0, "gradient_penalty": 10.0},
    "relativistic": {"r1": 0.5, "r2": 0.5},
    "hinge": {"r1": 0.0},
}


def training_defaults(model: str, objective: str | None) -> dict:
    """Fields of TrainConfig that differ from its own defaults for ``model`` trained with ``objective``."""
    return (_IMPROVED if model == "improved" else {}) | _PENALTIES.get(objective, {})


def checked(model: str, config: TrainConfig, typed: dict) -> TrainConfig:
    """The settings, or UserError where ``model`` cannot be trained with them, or a ``typed`` flag has no part in them."""
    if model == "dcgan" and (config.objective == "wgan" or typed.get("gradient_penalty")):
        # Gulrajani et al. 2017: the penalty is on each image by itself, and batch norm makes every verdict depend on all of them.
        name = "objective wgan" if config.objective == "wgan" else "gradient_penalty"
        raise UserError(f"--{name} needs a critic without batch norm, which dcgan's has; use --model improved for it")
    if typed.get("label_smoothing") and config.objective != "non_saturating":
        raise UserError(
            f"--label_smoothing belongs to --objective non_saturating, and {config.objective} has no targets; leave it out"
        )
    return config


def penalties(model: str, objective: str) -> dict[str, float]:
    """Weights of the gradient penalties that ``model`` is trained with under ``objective``."""
    return {name: training_defaults(model, objective).get(name, 0.0) for name in ("r1", "r2", "gradient_penalty")}


def _learning_rates(typed: dict) -> dict[str, float]:
    """The improved model's, larger for larger batches, said in a line. typed: the flags that were."""
    size = typed.get("batch_size", TrainConfig.batch_size)
    # By the square root of its size (Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", 2022).
    factor = math.sqrt(min(max(size, TrainConfig.batch_size), LARGEST_MEASURED) / TrainConfig.batch_size)
    rates = {name: factor * _IMPROVED[name] for name in ("lr_g", "lr_d") if name not in typed}
    if factor > 1.0 and rates:
        say(f"--batch_size {size}: {', '.join(f'--{name} {value:.2g}' for name, value in rates.items())}, larger than for 8")
    return rates


def new_config(args: argparse.Namespace, augmentation: dict[str, float], labels: Callable[[], set[str]]) -> TrainConfig:
    """Settings of a new run: typed flags over the defaults. labels: of the patches, asked for where no --condition was typed."""
    typed = options.given(args, options.RUN_FLAGS)
    model = args.model or DEFAULT_MODEL
    defaults = training_defaults(model, typed.get("objective"))
    if model == "improved":
        defaults |= _learning_rates(typed)
    condition = args.condition or _condition_for(labels())
    config = TrainConfig(patches=str(args.patches), condition=condition, augmentation=augmentation, **defaults | typed)
    return checked(model, config, typed)


def _condition_for(labels: set[str]) -> str:
    """ "label" where the patches carry at least two, said in a line."""
    condition = "label" if len(labels) > 1 else "none"
    say(f"--condition {condition}: the patches carry {len(labels)} label(s): {', '.join(sorted(labels))}")
    return condition


def patch_size(args: argparse.Namespace) -> int:
    """Side in pixels of the patches that teach the networks that the flags ask for."""
    return painted_size(args.model or DEFAULT_MODEL, args.image_size or DEFAULT_SIZE)


def preset_for(device: torch.device) -> str:
    """The preset that suits a machine."""
    return "gpu" if device.type == "cuda" else "cpu"


def model_config(args: argparse.Namespace, num_classes: int, device: torch.device) -> ModelConfig:
    """The networks that the flags ask for."""
    model, chosen = args.model or DEFAULT_MODEL, options.given(args, options.MODEL_FLAGS)
    chosen.setdefault("preset", preset_for(device))
    return networks(model, args.image_size or DEFAULT_SIZE, num_classes, **chosen)


def networks(model: str, image_size: int, num_classes: int, preset: str = "cpu", **chosen) -> ModelConfig:
    """``model`` for images of ``image_size``, painted larger where that is better. preset, chosen: of improved_config alone."""
    if model == "dcgan":
        return dcgan_config(image_size, num_classes)
    painted = painted_size(model, image_size)
    return improved_config(painted, num_classes, preset, **chosen, reduced_to=image_size if image_size < painted else 0)


def preset_of(model: ModelConfig) -> str:
    """Name of the preset that the networks have the widths of, "" where there is none, as for the baseline."""
    own = model.g_channels if model.model == "improved" else None
    return next((name for name, (maps, _) in WIDTHS.items() if maps[: len(model.g_channels)] == own), "")


def check_same_networks(args: argparse.Namespace, model: ModelConfig) -> None:
    """Raise UserError for a typed flag that contradicts the networks of the checkpoint that a run goes on from."""
    held = {
        "preset": preset_of(model),
        "discriminator": model.discriminator,
        "norm": model.norm,
        "attention": bool(model.attention),
        "spectral_norm": model.spectral_norm,
        "grow_from": model.grow_from,
        "window": model.seen,
    }
    for name, value in options.given(args, options.MODEL_FLAGS).items():
        if name in ("grow_from", "window"):
            value = min(value, model.image_size)  # as where the run began
        if model.model != "improved" or value != held[name]:
            raise UserError(f"--{name} {value} contradicts the checkpoint's networks; leave it out to go on with that run")


def settings_of(trainer: Trainer) -> dict:
    """All that a run is made of, by name, for people: image_size is that of the images that come out."""
    model = trainer.model
    settings = model.to_dict() | trainer.config.to_dict()
    if settings.pop("reduced_to"):
        settings["image_size"] = f"{model.output_size}, painted at {model.image_size}"
    settings["keep"] = settings["keep"] or "3, or as many as there are"
    if settings["eval_every"] is None:
        settings["eval_every"] = "20, less often where that takes much of the time"
    return settings


def in_words(trainer: Trainer, patches: int, source: Path | None) -> str:
    """What is trained from which checkpoint on, on ``patches`` patches, and on what, for the log."""
    model, config, world = trainer.model, trainer.config, trainer.processes.world
    size, preset = model.output_size, preset_of(model)
    painted = f", painted at {model.image_size}x{model.image_size}" if model.reduced_to else ""
    classes = f" {trainer.classes}" if trainer.classes else ""
    return (
        f"{f'resume {source} at epoch {trainer.epoch:.2f}' if source else 'start'}: "
        f"{model.model} {size}x{size}{painted}, {f'preset {preset}, ' if preset else ''}"
        f"condition {config.condition}{classes}, {patches} patches an epoch, epochs {config.epochs}, "
        f"batch {config.batch_size}{f' over {world} processes' if world > 1 else ''}, {describe(trainer.device)}, "
        f"torch {torch.__version__}"
    )
