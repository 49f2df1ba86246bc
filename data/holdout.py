"""Which patches to judge by: real tissue of other slides than those to train on."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from data.dataset import PatchFile, list_patches
from data.manifest import NAME
from data.panda import SlideRecord, split_by_slide
from data.shards import is_sharded

SHARE = 0.2
MIN_PATCHES = 20
TRAINED_ON = (
    "The patches have no split, so train.py trains on all of them: the held-out patches here are a fifth of the slides that "
    "networks have seen as well. Comparisons with them flatter, and copies of that fifth are not sought. A patches.csv with a "
    "split mends it."
)


def groups_of(folder: Path, files: list[PatchFile]) -> list[str]:
    """The slide of each image to be judged; without a manifest, which makes them patches, each stands for itself.

    Other programs number their images, and sample_3_0001.png is of no slide "sample".
    """
    of_slides = (folder / NAME).exists() or is_sharded(folder)
    return [file.slide_id if of_slides else file.path for file in files]


def what_flatters(train: list[PatchFile], held_out: list[PatchFile]) -> list[str]:
    """A sentence for each reason why held-out patches are no news to a network: trained on, or of slides with training patches."""
    notes = [TRAINED_ON] if held_out[0].split == "train" else []
    held = {file.slide_id for file in held_out}
    if shared := held & {file.slide_id for file in train}:
        notes.append(
            f"{len(shared)} of {len(held)} held-out slides have training patches too (by patches.csv, or by names SLIDE_X_Y), so "
            "comparisons with them flatter. check_data.py names them; split the patches by slide."
        )
    return notes


def train_and_held_out(folder: Path) -> tuple[list[PatchFile], list[PatchFile]]:
    """Training and held-out patches: each as its row or folder says, as train.py takes it, or a fifth of the slides (by a hash of
    their names) where there is no split.

    These were trained on as well, see TRAINED_ON; their ``split`` still says "train".
    Raises UserError when either side has fewer than MIN_PATCHES.
    """
    files = list_patches(folder)
    sides = [file.split for file in files]
    if len(set(sides)) < 2:
        by_slide = split_by_slide([SlideRecord(slide) for slide in {file.slide_id for file in files}], SHARE)
        sides = [by_slide[file.slide_id] for file in files]
    train, held_out = ([file for file, side in zip(files, sides, strict=True) if side == name] for name in ("train", "test"))
    if min(len(train), len(held_out)) < MIN_PATCHES:
        found = f"{folder} has {len(train)} training and {len(held_out)} held-out patches"
        raise UserError(f"{found}, and at least {MIN_PATCHES} of each are needed; extract patches from more slides")
    return train, held_out
