"""Going on with a run: which checkpoint, with which settings."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from common.progress import say
from models.config import ModelConfig
from models.dcgan import from_legacy
from training import checkpoint, options
from training.config import TrainConfig
from training.trainer import Trainer


def find_state(args: argparse.Namespace, folder: Path, log_folder: Path) -> tuple[Path | None, dict | None]:
    """(file, state) to go on from; (None, None) for a new run. A plain state_dict comes back as a state without progress."""
    if args.resume is None:
        held = checkpoint.all_in(folder)
        if held:
            raise UserError(
                f"{folder} holds a run already ({held[0].name}); go on with --resume, or start another with --run_name NAME"
            )
        if any((log_folder / "samples").glob("epoch_*.png")):
            raise UserError(f"{log_folder} holds another run's log; move it away, or choose a --run_name NAME")
        return None, None
    if args.resume == "":
        path, state, complaints = checkpoint.newest_whole(folder)
        for complaint in complaints:
            say(f"warning: {complaint}")
    else:
        path = Path(args.resume)
        state = checkpoint.load(path)
        if path.parent.resolve() != folder.resolve() and checkpoint.all_in(folder):
            raise UserError(f"{folder} holds another run than {path}; choose another --run_name for this one")
    if checkpoint.is_plain_state_dict(state):
        return path, take_over_legacy(path, state)
    missing = [name for name in ("model", "config", "classes", "progress") if name not in state]
    if missing:
        raise UserError(f"{path} lacks its {', '.join(missing)}; it was not written by train.py, resume from another checkpoint")
    return path, state


def take_over_legacy(path: Path, generator: dict) -> dict:
    """A bare DCGAN generator (and D_final.pt beside it) as the start of a run; its files are kept under other names."""
    beside = path.with_name("D_final.pt")
    discriminator = checkpoint.load(beside) if beside.exists() else None
    model, generator, discriminator = from_legacy(generator, discriminator)
    for file in (path, beside):
        if file.exists():
            checkpoint.keep_as(file, file.with_name(f"legacy_{file.name}"))
    found = "generator and discriminator" if discriminator else "generator only (no D_final.pt beside it)"
    say(f"warning: {path} holds bare weights: {found}; optimisers, averages and epochs could not be restored and start anew")
    return {"model": model.to_dict(), "classes": [], "legacy": (generator, discriminator)}


def merged_config(args: argparse.Namespace, state: dict, augmentation_defaults: dict[str, float]) -> TrainConfig:
    """The settings of a resumed run: typed flags over the checkpoint's. Raises UserError for a flag that contradicts it."""
    typed = options.given(args, options.RUN_FLAGS)
    augmentation = options.given(args, options.AUGMENTATIONS)
    if "config" in state:
        config = TrainConfig.from_dict(state["config"])
    else:
        config = TrainConfig(patches=str(args.patches), condition="none", augmentation=augmentation_defaults)
    model = ModelConfig.from_dict(state["model"])
    fixed = {name: getattr(config, name) for name, free in options.RUN_FLAGS.items() if not free and "config" in state}
    fixed |= {"condition": config.condition, "image_size": model.output_size, "model": model.model}
    for name, value in fixed.items():
        if getattr(args, name) not in (None, value):
            raise UserError(
                f"--{name} {getattr(args, name)} contradicts the checkpoint's {value}; leave it out to go on with that run"
            )
    return replace(config, patches=str(args.patches), augmentation=config.augmentation | augmentation, **typed)


def restore(trainer: Trainer, state: dict) -> None:
    """Bring the trainer to where the checkpoint was."""
    if "legacy" in state:
        trainer.restore_legacy(*state["legacy"])
        return
    trainer.restore(state)
    before = state["progress"]["images_per_epoch"]
    if before != trainer.images_per_epoch:
        say(f"note: an epoch was {before} patches and is now {trainer.images_per_epoch}; {trainer.images} images seen count on")
