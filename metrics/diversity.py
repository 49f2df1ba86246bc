"""Are the images of each label as varied as real ones, or the same few over and over?"""

from __future__ import annotations

import numpy as np

from metrics.distances import distances, kth_distances
from metrics.images import MIN_IMAGES, ImageSet, choose
from metrics.section import Finding, Section, Table

# Generated over real: held-out labels stay above both limits (docs/evaluation.md).
SPREAD_LIMIT = 0.75
NEAREST_LIMIT = 0.6


def spread(features: np.ndarray) -> float:
    """Mean distance between two different vectors of (N, D)."""
    count = len(features)
    return float(distances(features, features).sum() / (count * (count - 1)))


def nearest(features: np.ndarray) -> float:
    """Median distance of a vector to its nearest other one."""
    return float(np.median(kth_distances(features, 1)))


def diversity_section(train: ImageSet, held_out: ImageSet, fake: ImageSet, features: dict[str, np.ndarray], seed: int) -> Section:
    """Variety of each label (and of all images) against equally many training patches. features: "train", "held_out", "fake"."""
    section = Section("diversity", "Variety", _EXPLANATION)
    rows = []
    for label in ["", *filter(None, np.unique(fake.labels))]:
        parts = {
            name: features[name][images.labels == label] if label else features[name]
            for name, images in (("train", train), ("held_out", held_out), ("fake", fake))
        }
        generated, control = (_ratios(parts[name], parts["train"], seed) for name in ("fake", "held_out"))
        name = label or "all images"
        if generated is None:
            rows.append([name, "too few images", "", "", "", ""])
            continue
        section.numbers[name] = {"generated": generated, "held_out": control}
        rows.append([name, *_cells(generated), *_cells(control), str(len(parts["fake"]))])
        section.findings += _findings(name, generated)
    if not section.numbers:
        section.untested.append(f"Variety was not tested: fewer than {MIN_IMAGES} images.")
    columns = ["", "spread", "nearest", "held-out spread", "held-out nearest", "images"]
    section.tables.append(Table("Distances among images over those among equally many training patches", columns, rows))
    return section


_EXPLANATION = (
    "Spread: mean distance between two images; nearest: median distance to the most similar other image; both in Inception's "
    "features and "
    "relative to real patches of the label. Near 1 is as varied as real tissue, far below is collapse."
)


def _ratios(features: np.ndarray, real: np.ndarray, seed: int) -> dict[str, float] | None:
    count = min(len(features), len(real))
    if count < MIN_IMAGES:
        return None
    mine, reference = features[choose(len(features), count, seed)], real[choose(len(real), count, seed)]
    return {"spread": spread(mine) / spread(reference), "nearest": nearest(mine) / nearest(reference)}


def _cells(ratios: dict[str, float] | None) -> list[str]:
    return ["-", "-"] if ratios is None else [f"{ratios['spread']:.2f}", f"{ratios['nearest']:.2f}"]


def _findings(name: str, ratios: dict[str, float]) -> list[Finding]:
    limits = {"spread": SPREAD_LIMIT, "nearest": NEAREST_LIMIT}
    low = [key for key, limit in limits.items() if ratios[key] < limit]
    if not low:
        return []
    text = f"collapse: {name} {'are' if name == 'all images' else 'images are'} far less varied than real ones"
    return [Finding("diversity", text, ratios[low[0]], limits[low[0]])]
