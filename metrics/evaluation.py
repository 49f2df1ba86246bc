"""The whole evaluation of one set of generated images: which parts run on what, in which order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from metrics.features import Extractor, extract
from metrics.images import ImageSet
from metrics.quality import FeatureSets, quality_section
from metrics.section import Section

PARTS = ("distances", "copies", "artefacts", "grades", "utility")


def assess(
    train: ImageSet,
    held_out: ImageSet,
    fake: ImageSet,
    extractors: Sequence[Extractor],
    seed: int,
    skip: Collection[str] = (),
    cache: Path | None = None,
) -> list[Section]:
    """Sections of the report, in the order of PARTS less those to ``skip``.

    train, held_out: real patches of different slides. extractors: the first (Inception) is the standard, the others are second
    opinions. cache: folder where features of real patches are kept by content.
    """
    spaces = [_features(train, held_out, fake, extractor, cache) for extractor in extractors]
    makers = {"distances": lambda: quality_section(train, held_out, fake, spaces, seed)}
    return [makers[part]() for part in PARTS if part in makers and part not in skip]


def _features(train: ImageSet, held_out: ImageSet, fake: ImageSet, extractor: Extractor, cache: Path | None) -> FeatureSets:
    parts = {
        "train": extract(train.images, extractor, f"{extractor.name}, training patches", cache),
        "held_out": extract(held_out.images, extractor, f"{extractor.name}, held-out patches", cache),
        "fake": extract(fake.images, extractor, f"{extractor.name}, generated images"),
    }
    return FeatureSets(extractor.name, **parts)
