"""How near the generated images are to real tissue: the distances of two feature spaces, with real tissue's own as the floor."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from metrics.distances import UNBIASED_FID, by_group, coverage_metrics, fid, kid
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
class Side:
    """Features (N, D) and the slide of each image, (N,); an image that came from no slide is its own."""

    features: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Pair:
    """What to compare with what."""

    real: Side
    fake: Side

    def smaller(self) -> int:
        return min(len(self.real.groups), len(self.fake.groups))


def compare(pair: Pair, equal: int, seed: int) -> dict | None:
    """All distances of one pair of sets; None when either has fewer than MIN_IMAGES. Coverage uses ``equal`` of both sides.

    one_slide: a side is of one slide, all but an image at most, whose differences from others kid_se cannot know.
    """
    if pair.smaller() < MIN_IMAGES:
        return None
    real, fake = pair.real.features, pair.fake.features
    value, error = kid(real, fake, pair.real.groups, pair.fake.groups)
    shares = coverage_metrics(real[choose(len(real), equal, seed)], fake[choose(len(fake), equal, seed)])
    sizes = {"n_real": len(real), "n_compared": len(fake), "n_equal": equal, "fid_biased": pair.smaller() < UNBIASED_FID}
    one_slide = not (by_group(pair.real.groups) and by_group(pair.fake.groups))
    return {"fid": fid(real, fake), "kid": value, "kid_se": error, "one_slide": one_slide, **shares, **sizes}


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
                rows = {f"{name}, {what}": row for name, pair in values[kind].items() for what, row in pair.items()}
                section.tables.append(_table(f"By {kind}, features of {network}", rows))
    if min(map(len, (train, held_out, fake))) < MIN_IMAGES:
        section.untested.append(f"Distances were not measured: fewer than {MIN_IMAGES} images.")
    else:
        section.summary.append(_summary(numbers[spaces[0].network]["all"]))
    return section


_EXPLANATION = (
    "The floor is what real training patches have against held-out slides: compare it with the images' row against held-out "
    "slides, and with no other. These two share what the held-out slides differ by, so that their difference is surer than either "
    "error. Against training patches the best is 0: images of the training patches' own kind, copies among them, are nearer to "
    "these than other slides' tissue is, and are not better than real for it. KID is unbiased for independent images; its standard "
    "error comes from leaving out whole slides of both sides, and cannot know how slides differ where a side is of one slide. FID "
    "of fewer than 2,048 images is biased upward and comparable only with FID of equally many. Precision: share of compared images "
    "that look like some real one; recall and coverage: share of real variety that is reached; density: about 1 when alike; all "
    "four from equally many images in every row of a table."
)
HELD_OUT, TRAINING, FLOOR = "{} against held-out", "{} against training", "floor: training against held-out"


def _summary(rows: dict[str, dict]) -> str:
    held_out, training, floor = (_kid_text(rows[name.format("generated")]) for name in (HELD_OUT, TRAINING, FLOOR))
    return (
        f"KID x1000 against held-out slides: {held_out} of the images, {floor} of training patches (the floor). "
        f"The images against training patches: {training}."
    )


def _space_numbers(train: ImageSet, held_out: ImageSet, fake: ImageSet, space: FeatureSets, seed: int) -> dict:
    """Rows of the tables: of all images by what is compared, then by label and by provider and what is compared."""

    def pairs(*chosen: np.ndarray, what: str = "generated") -> dict[str, Pair]:
        parts = zip((space.train, space.held_out, space.fake), (train, held_out, fake), chosen, strict=True)
        training, unseen, made = (Side(features[at], images.groups[at]) for features, images, at in parts)
        return {
            HELD_OUT.format(what): Pair(unseen, made),
            FLOOR: Pair(unseen, training),
            TRAINING.format(what): Pair(training, made),
        }

    everything = pairs(*(np.arange(len(images)) for images in (train, held_out, fake)))
    by_label = {
        label: pairs(*(images.labels == label for images in (train, held_out, fake)))
        for label in np.unique(fake.labels)
        if label and (train.labels == label).any()
    }
    providers = [provider for provider in np.unique(train.providers) if provider]
    own = {provider: _of_provider(fake, provider) for provider in providers}
    told_apart = any(chosen.any() for chosen in own.values())
    what = "generated" if told_apart else "generated of no known provider"
    by_provider = {
        provider: pairs(train.providers == provider, held_out.providers == provider, own[provider] | (not told_apart), what=what)
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
    equal = [values["n_equal"] for values in rows.values() if values]
    caption += f"; precision to coverage from {equal[0]} of each" if equal else ""
    columns = ["", "FID", "KID x1000", "precision", "recall", "density", "coverage", "images"]
    return Table(caption, columns, [_row(name, values) for name, values in rows.items()])


def _row(name: str, values: dict | None) -> list[str]:
    if values is None:
        return [name, "too few images", "", "", "", "", "", ""]
    fid_text = f"{values['fid']:.1f}" + (" (biased)" if values["fid_biased"] else "")
    shares = [number(values[key], 2) for key in ("precision", "recall", "density", "coverage")]
    return [name, fid_text, _kid_text(values), *shares, f"{values['n_real']} / {values['n_compared']}"]


def _kid_text(values: dict) -> str:
    return f"{1000 * values['kid']:.2f} ± {1000 * values['kid_se']:.2f}" + (" (one slide)" if values["one_slide"] else "")
