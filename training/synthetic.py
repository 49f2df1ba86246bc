"""What generate.py writes: a picture, a film, and a folder of images.

The folder is OUT/LABEL/000042.png and one manifest. It can be extended, and is never mixed with another's.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import replacing, write_csv
from common.film import write_film
from common.pictures import png, save
from common.progress import say, track
from training.processes import Processes
from training.sampling import CHUNK, Sampler

STOPS, FRAMES_BETWEEN_STOPS, FRAMES_PER_SECOND = 6, 24, 12  # of a film


@dataclass(frozen=True)
class Origin:
    """What the images of a folder have in common, columns of its manifest. best_of: candidates of which each image was chosen.

    guidance: how far labels were moved apart. judge: digest of the patches that the judge of best_of learned from, "" without one.
    """

    seed: int
    truncation: float
    checkpoint: str
    checkpoint_sha256: str
    best_of: int = 1
    guidance: float = 0.0
    judge: str = ""

    def same(self, row: Mapping[str, str]) -> bool:
        """Whether a row of a manifest is of this origin; where the checkpoint lies does not matter."""
        numbers = int(row["seed"]), float(row["truncation"]), int(row["best_of"]), float(row["guidance"])
        theirs = *numbers, row["checkpoint_sha256"], row["judge"]
        return theirs == (self.seed, self.truncation, self.best_of, self.guidance, self.checkpoint_sha256, self.judge)


COLUMNS = ("path", "label", "index", *Origin.__dataclass_fields__)


def draw_grid(sampler: Sampler, labels: Sequence[str], seed: int, path: Path) -> None:
    """One picture with a row for each label, as Sampler.grid."""
    picture = sampler.grid(labels, seed)
    save(picture, path)
    say(f"{path}: {picture.width} x {picture.height} pixels")


def draw_film(sampler: Sampler, label: str, seed: int, path: Path) -> None:
    """A closed walk between random images of a label, "" for an unconditional model."""
    walk = sampler.walk(label, seed, STOPS, FRAMES_BETWEEN_STOPS)
    write_film(path, sampler.render(walk, [label] * len(walk)), FRAMES_PER_SECOND)
    say(f"{path}: {len(walk)} frames between {STOPS} images{f' of {label}' if label else ''}")


def write_images(
    prepare: Callable[[], Callable[..., np.ndarray]], shares: Mapping[str, int], out: Path, origin: Origin, together: Processes
) -> None:
    """``shares`` images of each label, "" for an unconditional model; those that are there already are kept.

    prepare: called when an image is missing, before anything is written; gives sample(count, seed, label, start): uint8 (count,
    S, S, 3). Raises UserError where ``out`` holds other images.
    """
    rows, common = _read_rows(out, origin), astuple(origin)
    known = {path for path in rows if _is_there(out / path)}
    paths = {label: [f"{folder_of(label)}/{index:06d}.png" for index in range(count)] for label, count in shares.items()}
    sample = None if known.issuperset(path for names in paths.values() for path in names) else prepare()
    for label, names in paths.items():
        (out / folder_of(label)).mkdir(parents=True, exist_ok=True)
        rows |= {path: (path, folder_of(label), index, *common) for index, path in enumerate(names)}
    with together.first_goes_ahead():
        if together.first:  # before any image, so that what a killed run leaves behind is known for ours
            _write_manifest(out / "manifest.csv", rows)
    jobs = [(label, start) for label, count in shares.items() for start in range(0, count, CHUNK)][together.rank :: together.world]
    with ThreadPoolExecutor(2) as pool:
        being_written = iter(())
        for label, start in track(jobs, "generate", unit=f"groups of {CHUNK}"):
            wanted = paths[label][start : start + CHUNK]
            if not known.issuperset(wanted):
                images = sample(len(wanted), origin.seed, label, start)
                list(being_written)  # waits for the group before, and raises what went wrong with it
                being_written = pool.map(_save_png, [out / path for path in wanted], images)
        list(being_written)
    together.wait()
    counts = ", ".join(f"{folder_of(label)} {count}" for label, count in shares.items())
    say(f"{sum(shares.values())} images in {out} ({counts})")


def folder_of(label: str) -> str:
    """Name of a label's folder."""
    return label or "unconditional"


def _is_there(path: Path) -> bool:
    """Whether there is an image: a machine that lost its power may have left an empty file."""
    return path.exists() and path.stat().st_size > 0


def _write_manifest(path: Path, rows: dict[str, tuple]) -> None:
    write_csv(path, COLUMNS, (rows[name] for name in sorted(rows)))


def _read_rows(out: Path, origin: Origin) -> dict[str, tuple]:
    path = out / "manifest.csv"
    older = {"best_of": "1", "guidance": "0.0", "judge": ""}  # columns that older manifests lack
    try:
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", newline="") as file:
            rows = [older | row for row in csv.DictReader(file)]
            if not all(origin.same(row) for row in rows):
                what = "another checkpoint, seed, truncation, guidance or --best_of, or were chosen by other patches"
                raise UserError(f"{out} holds images that are of {what}; choose another --out")
            if rows:
                return {row["path"]: tuple(row[name] for name in COLUMNS) for row in rows}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged or another program's ({error}); choose another --out") from error
    if foreign := next(out.glob("*/*.png"), None):
        raise UserError(f"{out} holds images without a manifest ({foreign.name}); choose another --out")
    return {}


def _save_png(path: Path, image: np.ndarray) -> None:
    with replacing(path, durable=False) as file:
        file.write(png(image))
