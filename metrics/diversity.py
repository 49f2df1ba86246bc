"""Are the images of each label as varied as real ones, or the same few over and over?"""

from __future__ import annotations

import numpy as np

from common.labels import known
from metrics.distances import distances, kth_distances
from metrics.images import MIN_IMAGES, ImageSet, choose
from metrics.section import Finding, Section, Table, worst

# Generated over real: held-out labels stay above both limits (docs/evaluation.md).
SPREAD_LIMIT = 0.75
NEAREST_LIMIT = 0.6
TWIN_RADIUS = 0.1  # of what 90 % of real patches keep at most from the nearest other: less is the same one twice
REPEAT_RADIUS = 0.6  # of what all but 1 % of real patches keep from the nearest other: less is the same tissue again
REPEAT_LIMIT = 0.15  # share of images beyond that of held-out patches
ALL = "all images"


def spread(features: np.ndarray) -> float:
    """Mean distance between two different vectors of (N, D)."""
    count = len(features)
    return float(distances(features, features).sum() / (count * (count - 1)))


def apart(real: np.ndarray) -> np.ndarray:
    """Distance of each vector of (N, D) to its nearest other one, without those that are there twice: two such pairs would let
    generated images repeat each other as they like."""
    nearest = kth_distances(real, 1)
    return nearest[nearest > TWIN_RADIUS * np.quantile(nearest, 0.9)]


def diversity_section(train: ImageSet, held_out: ImageSet, fake: ImageSet, features: dict[str, np.ndarray], seed: int) -> Section:
    """Variety of each label (and of all images) against equally many training patches. features: "train", "held_out", "fake"."""
    section = Section("diversity", "Variety", _EXPLANATION)
    rows, few = [], []
    for label in ["", *filter(None, np.unique(fake.labels))]:
        parts = {
            name: features[name][images.labels == label] if label else features[name]
            for name, images in (("train", train), ("held_out", held_out), ("fake", fake))
        }
        generated, control = (variety(parts[name], parts["train"], seed) for name in ("fake", "held_out"))
        name = label or ALL
        if generated is None:
            rows.append([name, "too few images", *[""] * 6])
            few.append(name)
            continue
        section.numbers[name] = {"generated": generated, "held_out": control}
        rows.append([name, *_cells(generated), *_cells(control), str(len(parts["fake"]))])
        section.findings += _findings(name, generated)
    section.findings += _repeated(section.numbers)
    if few:
        what = "" if ALL in few else f" of {', '.join(few)}"
        section.untested.append(f"Variety{what} was not tested: fewer than {MIN_IMAGES} images, or different training patches.")
    measures = ("spread", "nearest", "repeats")
    columns = ["", *measures, *(f"held-out {measure}" for measure in measures), "images"]
    section.tables.append(Table("Distances among images over those among equally many training patches", columns, rows))
    return section


_EXPLANATION = (
    "Spread: mean distance between two images; nearest: median distance to the most similar other image; both in Inception's "
    "features and relative to real patches of the label. Near 1 is as varied as real tissue, far below is collapse. Repeats: share "
    "of images with another one nearer than real patches are to each other."
)


def least_varied(real: np.ndarray, real_labels: np.ndarray, fake: np.ndarray, fake_labels: np.ndarray) -> tuple[str, float] | None:
    """The label whose images have the least spread beside that of its real ones, and how much; None where none has enough."""
    found = {}
    for label in filter(known, np.unique(fake_labels)):
        if ratios := variety(fake[fake_labels == label], real[real_labels == label], 0):
            found[str(label)] = ratios["spread"]
    return min(found.items(), key=lambda item: item[1]) if found else None


def variety(features: np.ndarray, real: np.ndarray, seed: int) -> dict[str, float] | None:
    """How equally many of both vary: see _EXPLANATION. None where either are fewer than MIN_IMAGES, or real ones all the same."""
    count = min(len(features), len(real))
    if count < MIN_IMAGES:
        return None
    mine, reference = features[choose(len(features), count, seed)], real[choose(len(real), count, seed)]
    between, among = kth_distances(mine, 1), apart(reference)
    if not len(among):
        return None  # one patch over and over
    return {
        "spread": spread(mine) / spread(reference),
        "nearest": float(np.median(between) / np.median(among)),
        "repeats": float((between < REPEAT_RADIUS * np.quantile(among, 0.01)).mean()),
    }


def _cells(ratios: dict[str, float] | None) -> list[str]:
    return ["-"] * 3 if ratios is None else [f"{ratios['spread']:.2f}", f"{ratios['nearest']:.2f}", f"{ratios['repeats']:.0%}"]


def _low(ratios: dict[str, float]) -> dict[str, float]:
    """The limits that are not kept."""
    return {key: limit for key, limit in (("spread", SPREAD_LIMIT), ("nearest", NEAREST_LIMIT)) if ratios[key] < limit}


def _findings(name: str, ratios: dict[str, float]) -> list[Finding]:
    text = f"collapse: {name} {'are' if name == ALL else 'images are'} far less varied than real ones"
    return [Finding("diversity", text, ratios[key], limit) for key, limit in _low(ratios).items()][:1]


def _repeated(numbers: dict[str, dict]) -> list[Finding]:
    """One finding of the labels that repeat and are not collapsed altogether; of all images where no label was measured."""
    labels = [name for name in numbers if name != ALL] or list(numbers)
    names = [name for name in labels if not _low(numbers[name]["generated"])]
    shares = [numbers[name]["generated"]["repeats"] for name in names]
    controls = [numbers[name]["held_out"] for name in names]
    limits = [REPEAT_LIMIT + (control["repeats"] if control else 0) for control in controls]
    return worst("diversity", "repetition: many images come again, nearly alike (of {})", names, shares, limits)
