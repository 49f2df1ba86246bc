"""What a run is when its flags do not say: by model, by objective, by machine."""

from __future__ import annotations

import argparse

import torch

from common.errors import UserError
from models.config import ModelConfig, dcgan_config, improved_config
from training import options

DEFAULT_MODEL = "dcgan"
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
# A penalty belongs to some objectives: Gulrajani et al. 2017; R3GAN 2024; a hinge with spectral norm needs none.
_PENALTIES = {
    "wgan": {"r1": 0.0, "gradient_penalty": 10.0},
    "relativistic": {"r1": 0.5, "r2": 0.5},
    "hinge": {"r1": 0.0},
}


def training_defaults(model: str, objective: str | None) -> dict:
    """Fields of TrainConfig that differ from its own defaults for ``model`` trained with ``objective``."""
    return (_IMPROVED if model == "improved" else {}) | _PENALTIES.get(objective, {})


def model_config(args: argparse.Namespace, image_size: int, num_classes: int, device: torch.device) -> ModelConfig:
    """The networks that the flags ask for. Raises UserError for a flag that the model does not have."""
    chosen = options.given(args, options.MODEL_FLAGS)
    if (args.model or DEFAULT_MODEL) == "dcgan":
        if chosen:
            raise UserError(f"--{next(iter(chosen))} belongs to --model improved; add it or leave the flag out")
        return dcgan_config(image_size, num_classes)
    preset = chosen.pop("preset", "gpu" if device.type == "cuda" else "cpu")
    return improved_config(image_size, num_classes, preset, **chosen)
