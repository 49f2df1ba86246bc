"""Checkpoints: one file is one whole state, or it is not there.

A checkpoint is a dictionary of plain values and tensors, written by torch.save to a temporary file, flushed and renamed. It is
loaded with ``weights_only=True`` only, so that no file can run code, and the checksums of all its parts are verified first.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import torch

from common.errors import UserError
from common.files import replacing

FORMAT = 1
LATEST, BEST, FINAL = "latest.pt", "best.pt", "G_final.pt"
_NUMBERED = re.compile(r"epoch_(\d{4,})\.pt")


def save(path: Path, state: dict) -> None:
    """Write ``state`` so that ``path`` is whole or as it was. Raises OSError, with its errno, when the disk is full."""
    whole = io.BytesIO()  # torch.save reports a full disk as an error of its archive, without saying why
    torch.save({"format": FORMAT} | state, whole)
    with replacing(path) as file:
        file.write(whole.getbuffer())


def load(path: Path) -> dict:
    """State of a checkpoint, on the CPU; of a plain state_dict the tensors by name (no "format" key).

    Raises UserError when the file is missing, damaged, of a newer version, not a checkpoint, another program's, or would run code
    when loaded.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; name a file that train.py wrote, such as checkpoints/latest.pt")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path} is damaged (checksum of {damaged}); use an older checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 damaged bytes make an unpickler raise anything at all
        foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it is none, or holds objects that could run code when loaded" if foreign else "the file is cut off or damaged"
        raise UserError(f"{path} is not a whole checkpoint: {reason}; use another one") from error
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no checkpoint; give a file that train.py wrote")
    if is_plain_state_dict(state):
        return state
    if "format" not in state:
        raise UserError(
            f"{path} was not written by train.py; of other programs' files only a plain state_dict of a DCGAN generator is taken, "
            "as torch.save(generator.state_dict(), FILE) writes it"
        )
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {state['format']!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    return state


def is_plain_state_dict(state: dict) -> bool:
    """Whether ``load`` returned bare tensors by name, as ``torch.save(net.state_dict())`` writes them."""
    return all(isinstance(value, torch.Tensor) for value in state.values())


def numbered(folder: Path, epoch: int) -> Path:
    """Path of the checkpoint kept for ``epoch``: epoch_0020.pt."""
    return folder / f"epoch_{epoch:04d}.pt"


def keep_as(source: Path, target: Path) -> None:
    """Let ``target`` hold the same checkpoint as ``source`` without writing it twice where the file system can link."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def keep_other_latest(folder: Path, images: int, generator: dict[str, torch.Tensor]) -> Path | None:
    """Where latest.pt holds another state than one of ``generator``'s weights after ``images``: keep it as kept_epoch_0230.pt.

    A run that goes on from another checkpoint writes over latest.pt, which may be all there is of hours of training. Returns the
    new name, one that no run writes to or removes; None where nothing was kept: latest.pt is the same, absent or damaged.
    """
    try:
        held = load(folder / LATEST)
        progress, weights = held["progress"], held["generator"]
        tensors = ((value, generator.get(name)) for name, value in weights.items() if isinstance(value, torch.Tensor))
        if progress["images"] == images and all(b is not None and torch.equal(a, b.cpu()) for a, b in tensors):
            return None
        name = f"kept_{numbered(folder, round(epochs_of(progress))).stem}"
    except (UserError, KeyError, TypeError, ValueError, ArithmeticError):
        return None
    target = free_name(folder, name)
    keep_as(folder / LATEST, target)
    return target


def free_name(folder: Path, stem: str) -> Path:
    """STEM.pt in ``folder``, or the first of STEM_2.pt, STEM_3.pt ... that is free."""
    names = (f"{stem}{'' if number == 1 else f'_{number}'}.pt" for number in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def epochs_of(progress: dict) -> float:
    """Epochs seen at a checkpoint: those until the number of patches changed last, and those since."""
    epochs, images = progress.get("origin", (0.0, 0))
    return epochs + (progress["images"] - images) / progress["images_per_epoch"]


def origin_for(progress: dict, images_per_epoch: int) -> tuple[float, int]:
    """Where the count of epochs goes on with ``images_per_epoch`` patches: (epochs, images) of the last change of that number.

    Raises ValueError or ArithmeticError where ``progress`` makes no sense.
    """
    if progress["images_per_epoch"] != images_per_epoch:
        return epochs_of(progress), int(progress["images"])
    epochs, images = progress.get("origin", (0.0, 0))
    if not math.isfinite(epochs):
        raise ValueError(f"its count of epochs begins at {epochs}")
    return float(epochs), int(images)


def all_in(folder: Path) -> list[Path]:
    """Checkpoints of a run: latest.pt, which is never older than another, then the most recently written first."""
    if not folder.is_dir():
        return []
    paths = [*(path for name in (LATEST, BEST, FINAL) if (path := folder / name).is_file()), *all_numbered(folder)]
    # Times alone would not do: a folder that was copied has those of the copying.
    return sorted(paths, key=lambda path: (path.name == LATEST, path.stat().st_mtime_ns), reverse=True)


def all_numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints, the most recently written first: after going back, higher numbers may be of what was given up."""
    if not folder.is_dir():
        return []
    found = [
        (path.stat().st_mtime_ns, int(match[1]), path) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found, reverse=True)]


def is_complete(folder: Path) -> bool:
    """Whether the run was ended as it should be: G_final.pt is not older than latest.pt."""
    final, latest = folder / FINAL, folder / LATEST
    return final.exists() and not (latest.exists() and latest.stat().st_mtime_ns > final.stat().st_mtime_ns)


def newest_whole(folder: Path) -> tuple[Path, dict, list[str]]:
    """(path, state, what was wrong with newer ones) of the newest checkpoint in ``folder`` that is whole.

    Raises UserError when there is none.
    """
    complaints = []
    for path in all_in(folder):
        try:
            return path, load(path), complaints
        except UserError as error:
            complaints.append(str(error))
    detail = f" ({'; '.join(complaints)})" if complaints else ""
    raise UserError(f"--resume found no whole checkpoint in {folder}{detail}; start without --resume or name a file")


def prune(folder: Path, keep: int) -> None:
    """Remove all but the ``keep`` most recently written numbered checkpoints. latest.pt, best.pt and G_final.pt always stay."""
    for path in all_numbered(folder)[keep:]:
        path.unlink(missing_ok=True)
