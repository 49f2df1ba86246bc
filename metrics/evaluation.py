"""The whole evaluation of one set of generated images: which parts run on what, in which order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from metrics.artefacts import artefacts_section
from metrics.copies import Gallery, copies_section, pixel_suspicions, turned_suspicion
from metrics.diversity import diversity_section
from metrics.features import Extractor, extract
from metrics.images import ImageSet
from metrics.quality import FeatureSets, quality_section
from metrics.section import Section
from metrics.stationarity import stationarity_section
from metrics.utility import Labelled, grades_section, utility_section

PARTS = ("distances", "diversity", "copies", "artefacts", "grades", "utility")


@dataclass(frozen=True)
class Networks:
    """standard: Inception. second: another feature space, against fooling the first. symmetric: features that are the same in
    every quarter turn, to look for copies.
    """

    standard: Extractor
    second: Extractor | None = None
    symmetric: Extractor | None = None

    def shared(self, run: Callable[[Callable, Tensor], Tensor], world: int) -> Networks:
        """Each network over ``world`` processes: ``run(function, rows)`` gives all rows, each process having done its share."""

        def over_all(network: Extractor) -> Extractor:
            return replace(network, run=partial(run, network.run), batch=network.batch * world)

        return Networks(*(network and over_all(network) for network in (self.standard, self.second, self.symmetric)))


@dataclass(frozen=True)
class Sets:
    """train and held_out: real patches of different slides. gallery: every training patch, however many."""

    train: ImageSet
    held_out: ImageSet
    fake: ImageSet
    gallery: Gallery


def assess(sets: Sets, networks: Networks, seed: int, skip: Collection[str] = (), cache: Path | None = None) -> list[Section]:
    """Sections of the report, in the order of PARTS less those to ``skip``. cache: folder for features of real patches."""
    train, held_out, fake = sets.train, sets.held_out, sets.fake
    sections: list[Section] = []
    if not {"distances", "diversity", "grades", "utility"} <= set(skip):
        standard = _features(sets, networks.standard, cache)
    if "distances" not in skip:
        spaces = [standard, *(_features(sets, extractor, cache) for extractor in [networks.second] if extractor)]
        sections.append(quality_section(train, held_out, fake, spaces, seed))
    if "diversity" not in skip:
        sections.append(diversity_section(train, held_out, fake, vars(standard), seed))
    if "copies" not in skip:
        sections.append(_copies(sets, networks, cache))
    if "artefacts" not in skip:
        sections.append(stationarity_section(fake, train, held_out))
        sections.append(artefacts_section(fake, train, held_out))
    if not {"grades", "utility"} <= set(skip):
        labelled = [Labelled(getattr(standard, name), part.labels, part.groups) for name, part in _named(sets)]
        sections += [grades_section(*labelled)] if "grades" not in skip else []
        sections += [utility_section(*labelled, seed)] if "utility" not in skip else []
    return sections


def _named(sets: Sets) -> Sequence[tuple[str, ImageSet]]:
    return [("train", sets.train), ("held_out", sets.held_out), ("fake", sets.fake)]


def _features(sets: Sets, extractor: Extractor, cache: Path | None) -> FeatureSets:
    what = {"train": "training patches", "held_out": "held-out patches", "fake": "generated images"}
    parts = {
        name: extract(part.images, extractor, f"{extractor.name}, {what[name]}", None if name == "fake" else cache)
        for name, part in _named(sets)
    }
    return FeatureSets(extractor.name, **parts)


def _copies(sets: Sets, networks: Networks, cache: Path | None) -> Section:
    fake, held_out, thumbnails = sets.fake.images, sets.held_out.images, sets.gallery.thumbnails
    suspicions = pixel_suspicions(fake, held_out, thumbnails, networks.standard.device)
    if networks.symmetric:
        suspicions.append(turned_suspicion(fake, held_out, thumbnails, networks.symmetric, cache))
    return copies_section(fake, sets.fake.names, suspicions, sets.gallery)
