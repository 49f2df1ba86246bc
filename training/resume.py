"""Going on with a run: which checkpoint, with which settings."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from common.progress import say
from common.storage import Place, place
from models.config import ModelConfig
from models.dcgan import from_legacy
from training import checkpoint, options, presets, processes
from training.config import TrainConfig
from training.guard import DivergedError, check_finite
from training.lock import OccupiedError
from training.trainer import Trainer, best_of


def find_state(args: argparse.Namespace, folder: Path, log_folder: Path) -> tuple[Path | None, dict | None]:
    """(file, state) to go on from; (None, None) for a new run. A plain state_dict comes back as a state without progress."""
    if processes.restarted() and checkpoint.all_in(folder):
        args.resume = ""  # torchrun started everything again after a process failed
    if args.resume is None and options.only_looks(args):
        return None, None
    if args.resume is None:
        held = checkpoint.all_in(folder)
        if held:
            raise OccupiedError(
                f"{folder} holds a run already ({held[0].name}); go on with --resume, or start another with --run_name NAME"
            )
        _check_log_is_free(log_folder)
        return None, None
    if args.resume == "":
        path, state = newest_in(folder)
    else:
        path = Path(args.resume)
        state = checkpoint.load(path)
        own = path.parent.resolve() == folder.resolve()
        if not own and checkpoint.all_in(folder):
            raise OccupiedError(
                f"{folder} holds another run than {path}; --resume without a file goes on with the one in {folder}, another "
                "--run_name begins one from that file"
            )
        if not own:
            _check_log_is_free(log_folder)
        if own and path.name == checkpoint.FINAL:
            path, state = newest_after(path, state)
    if checkpoint.is_plain_state_dict(state):
        return path, take_over_legacy(path, state, None if options.only_looks(args) else folder)
    missing = [name for name in ("model", "config", "classes", "progress") if name not in state]
    if missing:
        raise UserError(f"{path} lacks its {', '.join(missing)}; it was not written by train.py, resume from another checkpoint")
    return path, state


def _check_log_is_free(folder: Path) -> None:
    if any((folder / "samples").glob("epoch_*.png")):
        raise OccupiedError(
            f"{folder} holds another run's log; move it away, or choose a --run_name NAME (to go on with that run, put its "
            "checkpoints back where they were)"
        )


def newest_in(folder: Path) -> tuple[Path, dict]:
    """(file, state) of the newest whole checkpoint; what is wrong with newer ones is said."""
    path, state, complaints = checkpoint.newest_whole(folder)
    for complaint in complaints:
        say(f"warning: {complaint}")
    return path, state


def newest_after(final: Path, state: dict) -> tuple[Path, dict]:
    """(file, state) of the run's newest whole checkpoint where it is further than ``final``, G_final.pt, else ``final``'s own.

    The command that prolongs a run names G_final.pt, and is what stands in scripts and in a shell's history: given again after a
    stop, it must go on and not start from there anew.
    """
    newest, newer = newest_in(final.parent)
    if _place(newer)[0] <= _place(state)[0]:
        return final, state
    say(
        f"note: {final} is at epoch {_place(state)[1]:.2f} and its training was gone on with: this goes on from {newest}, at epoch "
        f"{_place(newer)[1]:.2f}; to start from {final.name} once more, give it another name first"
    )
    return newest, newer


def _place(state: dict) -> tuple[int, float]:
    """(images, epochs) seen at a checkpoint; none for bare weights."""
    progress = state.get("progress")
    if not isinstance(progress, dict) or not {"images", "images_per_epoch"} <= progress.keys():
        return 0, 0.0
    return progress["images"], checkpoint.epochs_of(progress)


def patches_of(args: argparse.Namespace, state: dict | None) -> Place:
    """The folder that --patches names, else that of the run, else datasets/patches; a change is said."""
    held = str(state["config"].get("patches", "")) if state and isinstance(state.get("config"), dict) else ""
    if isinstance(args.patches, Path) and held and str(args.patches) != held:
        say(f"note: the run was trained on {held} until now and goes on with {args.patches}")
    return args.patches or place(held or "datasets/patches")


def take_over_legacy(path: Path, generator: dict, folder: Path | None) -> dict:
    """A bare DCGAN generator (and D_final.pt beside it) as the start of a run in ``folder``, None for one that writes nothing.

    Files there are kept under other names, since the run will write its own G_final.pt; other folders are only read.
    """
    beside = path.with_name("D_final.pt")
    discriminator = checkpoint.load(beside) if beside.exists() else None
    if discriminator and not checkpoint.is_plain_state_dict(discriminator):
        raise UserError(f"{path} holds bare weights and {beside.name} beside it does not; move that away to go on without it")
    model, generator, discriminator = from_legacy(generator, discriminator)
    for file in (path, beside):
        if folder and file.exists() and file.parent.resolve() == folder.resolve():
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
    if typed.get("objective", config.objective) != config.objective:
        penalties = presets.penalties(model.model, typed["objective"])
        say(f"--objective {typed['objective']} brings its own penalties: {', '.join(f'--{n} {w:g}' for n, w in penalties.items())}")
        typed = penalties | typed
    config = replace(config, patches=str(args.patches), augmentation=config.augmentation | augmentation, **typed)
    return presets.checked(model.model, config, typed)


def restore(trainer: Trainer, state: dict, folder: Path) -> None:
    """Bring the trainer to where the checkpoint was; a better best.pt in ``folder``, of what came after it, stays the best."""
    if "legacy" in state:
        trainer.restore_legacy(*state["legacy"])
        return
    if len(state["classes"]) != trainer.model.num_classes or not isinstance(state["progress"], dict):
        raise UserError("the checkpoint does not fit its own description (its classes or its progress); use another one")
    trainer.restore(state)
    try:
        check_finite(state)
    except DivergedError as error:
        raise UserError(f"the checkpoint is of a run that had diverged: {error}; resume from an earlier one") from error
    try:
        trainer.best_kid, trainer.best_scored_on = best_of(checkpoint.load(folder / checkpoint.BEST)["progress"])
    except (UserError, KeyError, TypeError, ValueError):  # absent, damaged or another program's: what comes next is the best here
        trainer.best_kid, trainer.best_scored_on = math.inf, ""
    before = state["progress"]["images_per_epoch"]
    if before != trainer.images_per_epoch:
        say(f"note: an epoch was {before} patches and is now {trainer.images_per_epoch}; epochs count on from {trainer.epoch:.2f}")
