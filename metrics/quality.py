"""How near the generated images are to real tissue: the distances of two feature spaces, with real tissue's own as the floor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metrics.distances import UNBIASED_FID, coverage_metrics, fid, kid
from metrics.images import MIN_IMAGES, ImageSet, choose
from metrics.section import Section, Table, number


@dataclass(frozen=True)
class FeatureSets:
    """Features of one network for the training patches, the held-out patches and the generated images, each (N, D)."""

    network: str
    train: np.ndarray
    held_out: np.ndarray
    fake: np.ndarray


def compare(real: np.ndarray, fake: np.ndarray, real_groups: np.ndarray, seed: int) -> dict | None:
    """All distances of one pair of sets; None when either has fewer than MIN_IMAGES. Coverage uses equally many of both sides."""
    if min(len(real), len(fake)) < MIN_IMAGES:
        return None
    value, error = kid(real, fake, real_groups if len(np.unique(real_groups)) > 1 else None)
    equal = min(len(real), len(fake))
    shares = coverage_metrics(real[choose(len(real), equal, seed)], fake[choose(len(fake), equal, seed)])
    smaller = {"n_real": len(real), "n_compared": len(fake), "n_equal": equal, "fid_biased": equal < UNBIASED_FID}
    return {"fid": fid(real, fake), "kid": value, "kid_se": error, **shares, **smaller}


def quality_section(train: ImageSet, held_out: ImageSet, fake: ImageSet, spaces: list[FeatureSets], seed: int) -> Section:
    """Distances against held-out slides and training patches, with the floor, per label and per provider."""
    numbers = {space.network: _space_numbers(train, held_out, fake, space, seed) for space in spaces}
    section = Section("distances", "Distance from real tissue", _EXPLANATION, numbers)
    if min(map(len, (train, held_out, fake))) < MIN_IMAGES:
        section.untested.append(f"Distances were not measured: fewer than {MIN_IMAGES} images.")
    for network, values in numbers.items():
        section.tables.append(_table(f"All images, features of {network}", values["all"]))
        for kind in ("label", "provider"):
            if values[kind]:
                rows = {f"{name}: {what}": row for name, pair in values[kind].items() for what, row in pair.items()}
                section.tables.append(_table(f"By {kind}, against training patches, features of {network}", rows))
    return section


_EXPLANATION = (
    "The floor is real tissue of other slides compared with the training patches: no generator can be expected to do better. "
    "KID is unbiased at any number of images; its standard error comes from leaving out whole slides. FID of fewer than 2,048 "
    "images "
    "is biased upward and comparable only with FID of equally many. Precision: share of generated images that look like some real "
    "one; "
    "recall and coverage: share of real variety that is reached; density: about 1 when alike."
)


def _space_numbers(train: ImageSet, held_out: ImageSet, fake: ImageSet, space: FeatureSets, seed: int) -> dict:
    everything = {
        "generated against held-out": compare(space.held_out, space.fake, held_out.groups, seed),
        "generated against training": compare(space.train, space.fake, train.groups, seed),
        "floor: held-out against training": compare(space.train, space.held_out, train.groups, seed),
    }
    by_label = {
        label: {
            "generated": compare(space.train[at], space.fake[fake.labels == label], train.groups[at], seed),
            "floor": compare(space.train[at], space.held_out[held_out.labels == label], train.groups[at], seed),
        }
        for label in np.unique(fake.labels)
        if label and (at := train.labels == label).any()
    }
    by_provider = {
        provider: {
            "generated": compare(space.train[at], space.fake, train.groups[at], seed),
            "floor": compare(space.train[at], space.held_out[held_out.providers == provider], train.groups[at], seed),
        }
        for provider in np.unique(train.providers)
        if provider and (at := train.providers == provider).any()
    }
    return {"all": everything, "label": by_label, "provider": by_provider}


def _table(caption: str, rows: dict[str, dict | None]) -> Table:
    columns = ["", "FID", "KID x1000", "precision", "recall", "density", "coverage", "images"]
    return Table(caption, columns, [_row(name, values) for name, values in rows.items()])


def _row(name: str, values: dict | None) -> list[str]:
    if values is None:
        return [name, "too few images", "", "", "", "", "", ""]
    fid_text = f"{values['fid']:.1f}" + (" (biased)" if values["fid_biased"] else "")
    kid_text = f"{1000 * values['kid']:.2f} ± {1000 * values['kid_se']:.2f}"
    shares = [number(values[key], 2) for key in ("precision", "recall", "density", "coverage")]
    return [name, fid_text, kid_text, *shares, f"{values['n_real']} / {values['n_compared']}"]
