"""What changes over a run, as pure functions of images seen: batch size, device count and resuming change nothing."""

from __future__ import annotations

import math

from models.config import View

TAIL = 0.25  # of the run: what a late decay takes


def learning_rate_factor(images: int, warmup_images: int, decay: str, images_total: int) -> float:
    """Factor of both learning rates: a linear warm-up, then 1 and on the way to ``images_total`` what ``decay`` says.

    none: 1 throughout. late: 1, and over the last quarter of the run linearly to 0, as in Zhai et al., "Scaling vision
    transformers" (2022): a run can be prolonged without having been slow. cosine: half a cosine from 1 to 0 over the whole run.
    """
    factor = min(1.0, (images + 1) / warmup_images) if warmup_images else 1.0
    left = max(0.0, 1.0 - images / max(1, images_total))
    if decay == "cosine":
        return factor * 0.5 * (1.0 - math.cos(math.pi * left))
    return factor * min(1.0, left / TAIL) if decay == "late" else factor


def growth(images: int, grow_from: int, image_size: int, grow_images: int) -> float:
    """log2 of the resolution in work, with a fraction while the next one fades in (Karras et al., progressive growing, 2018).

    Each resolution is trained for ``grow_images``, then the next fades in over as many.
    """
    first, last = math.log2(grow_from), math.log2(image_size)
    doublings, rest = divmod(images, 2 * grow_images)
    return min(last, first + doublings + max(0.0, rest / grow_images - 1.0))


def view_of(reached: float, seen: int, step: int, penalty_every: int, averaged: bool = False) -> View:
    """What a step looks at when the growth is ``reached`` and D sees ``seen`` pixels a side at once.

    Larger images are seen in turn as windows at full size and whole at half of it. Every other penalty falls on a window. averaged:
    half the size is what comes out, so that once grown whole images are seen as they will be, averaged down.
    """
    whole = View(reached)
    if whole.side <= seen:
        return whole
    if (step + step // penalty_every) % 2 == 0:
        return View(reached, windowed=True)
    return View(float(math.ceil(reached) - 1), averaged=averaged and whole.fade == 1.0)
