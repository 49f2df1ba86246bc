"""How near the generated images are to real tissue: the distances of two feature spaces, with real tissue's own as the floor."""

from __future__ import annotations

from collections.abc import Hashable
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


@dataclass(frozen=True)
class Pair:
    """Features to compare, (M, D) and (N, D), and the slide of each real one, (M,)."""

    real: np.ndarray
    fake: np.ndarray
    real_groups: np.ndarray

    def smaller(self) -> int:
        return min(len(self.real), len(self.fake))


def compare(pair: Pair, equal: int, seed: int) -> dict | None:
    """All distances of one pair of sets; None when either has fewer than MIN_IMAGES. Coverage uses ``equal`` of both sides."""
    if pair.smaller() < MIN_IMAGES:
        return None
    real, fake = pair.real, pair.fake
    value, error = kid(real, fake, pair.real_groups if len(np.unique(pair.real_groups)) > 1 else None)
    shares = coverage_metrics(real[choose(len(real), equal, seed)], fake[choose(len(fake), equal, seed)])
    sizes = {"n_real": len(real), "n_compared": len(fake), "n_equal": equal, "fid_biased": pair.smaller() < UNBIASED_FID}
    return {"fid": fid(real, fake), "kid": value, "kid_se": error, **shares, **sizes}


def compare_all(pairs: dict[Hashable, Pair], seed: int) -> dict[Hashable, dict | None]:
    """The rows of one table. Precision to coverage depend on the number of images: it is the smallest of any row with enough."""
    equal = min((pair.smaller() for pair in pairs.values() if pair.smaller() >= MIN_IMAGES), default=0)
    return {name: compare(pair, equal, seed) for name, pair in pairs.items()}


def quality_section(train: ImageSet, held_out: ImageSet, fake: ImageSet, spaces: list[FeatureSets], seed: int) -> Section:
    """Distances against held-out slides and training patches, with the floor, per label and per provider."""
    numbers = {space.network: _space_numbers(train, held_out, fake, space, seed) for space in spaces}
    section = Section("distances", "Distance from real tissue", _EXPLANATION, numbers)
    for network, values in numbers.items():
        section.tables.append(_table(f"All images, features of {network}", values["all"]))
        for kind in ("label", "provider"):
            if values[kind]:
                rows = {f"{name}: {what}": row for name, pair in values[kind].items() for what, row in pair.items()}
                section.tables.append(_table(f"By {kind}, against training patches, features of {network}", rows))
    if min(map(len, (train, held_out, fake))) < MIN_IMAGES:
        section.untested.append(f"Distances were not measured: fewer than {MIN_IMAGES} images.")
    else:
        section.summary.append(_summary(numbers[spaces[0].network]["all"]))
    return section


_EXPLANATION = (
    "The floor is real tissue of other slides compared with the training patches: no generator can be expected to do "
    "better. KID is unbiased for independent images. Patches of few slides are alike, which raises the floor and every row "
    "against held-out patches by the same amount: compare with the floor. Its standard error comes from leaving out whole "
    "slides. FID of fewer than 2,048 images is biased upward and comparable only with FID of equally many. Precision: share "
    "of generated images that look like some real one; recall and coverage: share of real variety that is reached; density: "
    "about 1 when alike; all four from equally many images in every row of a table."
)
GENERATED, FLOOR = "generated against {}", "floor: held-out against training"


def _summary(rows: dict[str, dict]) -> str:
    held_out, training, floor = (
        _kid_text(rows[name]) for name in (GENERATED.format("held-out"), GENERATED.format("training"), FLOOR)
    )
    generated = f"KID x1000 of the images: {held_out} against held-out slides, {training} against training patches"
    return f"{generated}; the floor, held-out slides against training patches: {floor}."


def _space_numbers(train: ImageSet, held_out: ImageSet, fake: ImageSet, space: FeatureSets, seed: int) -> dict:
    """Rows of the tables: of all images by what is compared, then by label and by provider and what is compared."""
    everything = {
        GENERATED.format("held-out"): Pair(space.held_out, space.fake, held_out.groups),
        GENERATED.format("training"): Pair(space.train, space.fake, train.groups),
        FLOOR: Pair(space.train, space.held_out, train.groups),
    }

    def against_training(at: np.ndarray, what: str, fake_at: np.ndarray, held_out_at: np.ndarray) -> dict[str, Pair]:
        pairs = {what: space.fake[fake_at], "floor": space.held_out[held_out_at]}
        return {name: Pair(space.train[at], part, train.groups[at]) for name, part in pairs.items()}

    by_label = {
        label: against_training(at, "generated", fake.labels == label, held_out.labels == label)
        for label in np.unique(fake.labels)
        if label and (at := train.labels == label).any()
    }
    providers = [provider for provider in np.unique(train.providers) if provider]
    own = {provider: _of_provider(fake, provider) for provider in providers}
    told_apart = any(chosen.any() for chosen in own.values())
    what = "generated" if told_apart else "generated of no known provider"
    by_provider = {
        provider: against_training(
            train.providers == provider, what, own[provider] | (not told_apart), held_out.providers == provider
        )
        for provider in providers
    }
    numbers = {"all": compare_all(everything, seed)}
    return numbers | {"label": _compare_nested(by_label, seed), "provider": _compare_nested(by_provider, seed)}


def _compare_nested(tables: dict[str, dict[str, Pair]], seed: int) -> dict[str, dict[str, dict | None]]:
    rows = compare_all({(name, what): pair for name, pairs in tables.items() for what, pair in pairs.items()}, seed)
    return {name: {what: rows[name, what] for what in pairs} for name, pairs in tables.items()}


def _of_provider(fake: ImageSet, provider: str) -> np.ndarray:
    """(N,) bool: the images that are of this provider by their patches.csv or by their label, such as gleason4-radboud."""
    return (fake.providers == provider) | np.char.endswith(fake.labels.astype(str), f"-{provider}")


def _table(caption: str, rows: dict[str, dict | None]) -> Table:
    equal = next((values["n_equal"] for values in rows.values() if values), 0)
    caption += f"; precision to coverage from {equal} of each"
    columns = ["", "FID", "KID x1000", "precision", "recall", "density", "coverage", "images"]
    return Table(caption, columns, [_row(name, values) for name, values in rows.items()])


def _row(name: str, values: dict | None) -> list[str]:
    if values is None:
        return [name, "too few images", "", "", "", "", "", ""]
    fid_text = f"{values['fid']:.1f}" + (" (biased)" if values["fid_biased"] else "")
    shares = [number(values[key], 2) for key in ("precision", "recall", "density", "coverage")]
    return [name, fid_text, _kid_text(values), *shares, f"{values['n_real']} / {values['n_compared']}"]


def _kid_text(values: dict) -> str:
    return f"{1000 * values['kid']:.2f} ± {1000 * values['kid_se']:.2f}"
