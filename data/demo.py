"""Demo slides in PANDA's layout: which slides there are, and writing them as pyramids, masks and train.csv.

The tissue itself is painted by ``data.demo_slide`` and the modules below it. Slide k depends on the seed, the slide size and k
alone: not on the number of slides, the number of processes or earlier runs.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tifffile

from common.errors import UserError
from common.files import replacing, write_text
from common.progress import track
from data.demo_slide import SlidePlan, paint_slide
from data.panda import TRAIN_CSV_COLUMNS, SlideRecord, isup_from_gleason
from data.workers import start_worker

SETTINGS = "demo.json"
PAINTER = 1  # raise it whenever the same seed gives other pictures
TILE = 512
SHRINK = (1, 4, 16)  # of the pyramid's levels, as in PANDA
SMALLEST = 512  # pixels; below that no core of tissue fits

# (provider, Gleason score, what is special); slide k follows row k modulo 12.
_PLANS = (
    ("radboud", "3+4", ""),
    ("karolinska", "5+5", ""),
    ("radboud", "0+0", "pen"),
    ("karolinska", "3+3", "blur"),
    ("radboud", "4+5", "blur"),
    ("karolinska", "4+4", ""),
    ("radboud", "4+3", "pen"),
    ("karolinska", "0+0", ""),
    ("radboud", "5+5", "blur"),
    ("karolinska", "3+4", "pen"),
    ("radboud", "3+3", ""),
    ("karolinska", "0+0", "blank"),
)


def plan_slide(seed: int, index: int) -> SlidePlan:
    """Id, provider, grade and peculiarities of slide ``index``."""
    provider, score, special = _PLANS[index % len(_PLANS)]
    slide_id = hashlib.sha256(f"demo slide {seed} {index}".encode()).hexdigest()[:32]
    mpp = 0.4862 if provider == "radboud" else (0.4520, 0.5032)[index // 2 % 2]
    return SlidePlan(slide_id, provider, score, mpp, **({special: True} if special else {}))


def write_demo_slides(out: Path, num_slides: int, slide_size: int, seed: int = 0, workers: int = 1) -> list[SlideRecord]:
    """Write ``num_slides`` slides of ``slide_size`` x ``slide_size`` pixels (a multiple of 16, at least 512) into ``out``.

    Slides that an earlier run with the same seed and size completed are kept, so a stopped run goes on where it was; more slides
    may be asked for later. Returns the rows of train.csv in file order, as ``data.panda.read_train_csv`` reads them.

    Raises UserError when ``out`` holds slides of other settings or of somebody else, or cannot be written to.
    """
    if slide_size < SMALLEST or slide_size % SHRINK[-1]:
        raise UserError(f"a slide size of {slide_size} is not a multiple of {SHRINK[-1]} from {SMALLEST} on; try 4096")
    plans = [plan_slide(seed, index) for index in range(num_slides)]
    table = _train_csv(plans)
    _claim_folder(out, {"painter": PAINTER, "slide_size": slide_size, "seed": seed}, table)
    missing = [index for index, plan in enumerate(plans) if not all(path.exists() for path in _paths(out, plan))]
    try:
        for _ in track(_write_all(out, missing, slide_size, seed, workers), "drawing slides", total=len(missing), unit="slides"):
            pass
        write_text(out / "train.csv", table)
    except OSError as error:
        raise UserError(f"{out} cannot be written to ({error}); make room or choose another --out, then run again") from error
    except MemoryError as error:
        raise UserError(f"slides of {slide_size} pixels do not fit the memory; draw smaller ones") from error
    except BrokenProcessPool as error:
        raise UserError("a drawing process was killed, most likely for lack of memory; run again with --workers 1") from error
    return [SlideRecord(plan.slide_id, plan.provider, isup_from_gleason(plan.score), plan.score) for plan in plans]


def _train_csv(plans: list[SlidePlan]) -> str:
    lines = [",".join(TRAIN_CSV_COLUMNS)]
    for plan in plans:
        spelled = "negative" if plan.provider == "radboud" and plan.score == "0+0" else plan.score
        lines.append(f"{plan.slide_id},{plan.provider},{isup_from_gleason(plan.score)},{spelled}")
    return "".join(f"{line}\n" for line in lines)


def _paths(out: Path, plan: SlidePlan) -> tuple[Path, Path]:
    return out / "train_images" / f"{plan.slide_id}.tiff", out / "train_label_masks" / f"{plan.slide_id}_mask.tiff"


def _claim_folder(out: Path, settings: dict, table: str) -> None:
    """Make ``out`` ready for slides of these settings, or refuse it; nothing in it is ever overwritten."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        ours = json.loads((out / SETTINGS).read_text("utf-8")) if (out / SETTINGS).exists() else None
        known = (out / "train.csv").read_text("utf-8") if (out / "train.csv").exists() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{out} cannot be used for demo slides ({error}); choose another --out") from error
    if ours is None and any((out / name).exists() for name in ("train.csv", "train_images", "train_label_masks")):
        raise UserError(f"{out} holds slides that are not demo slides; choose another --out")
    if ours not in (None, settings):
        raise UserError(f"{out} holds demo slides of other settings ({ours}); choose another --out or remove that folder")
    asked = {line.split(",")[0] for line in table.splitlines()}
    drawn = {path.stem for path in (out / "train_images").glob("*.tiff")}
    if not table.startswith(known) or drawn - asked:
        raise UserError(f"{out} holds more or other slides than asked for; choose another --out or remove that folder")
    write_text(out / SETTINGS, json.dumps(settings) + "\n")  # first: a folder of slides without it is refused
    for name in ("train_images", "train_label_masks"):
        (out / name).mkdir(exist_ok=True)


def _write_all(out: Path, indices: list[int], size: int, seed: int, workers: int) -> Iterator[None]:
    """Draw the slides, yielding after each; processes are used when there are several ``workers`` and slides."""
    if min(workers, len(indices)) <= 1:
        for index in indices:
            yield _write_slide(out, index, size, seed)
        return
    pool = ProcessPoolExecutor(min(workers, len(indices)), multiprocessing.get_context("spawn"), start_worker)
    try:
        for done in as_completed([pool.submit(_write_slide, out, index, size, seed) for index in indices]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_slide(out: Path, index: int, size: int, seed: int) -> None:
    plan = plan_slide(seed, index)
    image, mask = paint_slide(np.random.default_rng([seed, index, size]), plan, size)
    image_path, mask_path = _paths(out, plan)
    with replacing(image_path, durable=False) as file:
        levels = [_area_mean(image, step) for step in SHRINK]
        _write_pyramid(file, levels, plan.mpp, compression="jpeg", compressionargs={"level": 80}, subsampling=(1, 1))
    red = np.zeros((*mask.shape, 3), np.uint8)
    red[..., 0] = mask
    with replacing(mask_path, durable=False) as file:
        _write_pyramid(file, [red[step // 2 :: step, step // 2 :: step] for step in SHRINK], plan.mpp, compression="zlib")


def _area_mean(image: np.ndarray, step: int) -> np.ndarray:
    """(h, w, 3) uint8 shrunk by a whole number: the mean of each step x step block, rounded."""
    h, w, channels = image.shape
    blocks = image.reshape(h // step, step, w // step, step, channels)
    return image if step == 1 else (blocks.mean((1, 3), dtype=np.float32) + 0.5).astype(np.uint8)


def _write_pyramid(file, levels: list[np.ndarray], mpp: float, **options) -> None:
    """One tiled TIFF whose reduced levels and resolution (pixels per centimetre) OpenSlide understands."""
    with tifffile.TiffWriter(file) as tiff:
        for level, pixels in enumerate(levels):
            tiff.write(
                pixels,
                tile=(TILE, TILE),
                photometric="rgb",
                subfiletype=int(level > 0),
                resolution=(1e4 / (mpp * SHRINK[level]),) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
                software="demo slides",
                **options,
            )
