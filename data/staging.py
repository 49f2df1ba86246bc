"""Extraction from and to other file systems: what a slide's work needs is brought here, what came of it is sent back.

A worker fetches a slide and its mask whole (OpenSlide reads files), works on them in a scratch folder, stores the patches and
deletes everything: never more than one slide a worker is on the disk. Each slide is fetched twice, to find its tissue, and to
cut it and draw its overlay. Journal and manifest are written by the process that was started, into a scratch folder, and
published: after the patches that they name, and before patches that they no longer name are removed. So rows and files of what is
published agree whenever a run is killed, and the next one, on whichever machine, goes on from there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from common import storage
from common.errors import UserError
from common.storage import Place, Remote
from data import cutting, manifest
from data.cutting import Candidate, Cut, Cutting, Failure, Job, Scan
from data.journal import NAME as JOURNAL
from data.manifest import Patch
from data.panda import LABELS

SETTINGS_NAME = "extract.json"
FAILED_NAME = "failed_slides.csv"
SECONDS_BETWEEN = 15.0
LARGEST_SHARE = 0.05  # of the time goes into publishing: the journal of a million slides has gigabytes


class Output:
    """The patch folder of a run, as a context manager. here: the folder of this machine where its journal, settings and manifest
    are written, which is the patch folder itself unless that is on another file system."""

    def __init__(self, folder: Place):
        self.folder, self._stack = folder, contextlib.ExitStack()
        self.here = folder if isinstance(folder, Path) else Path()
        self._version, self._last, self._took = "", time.monotonic(), 0.0
        self._own = manifest.OwnColumns()

    def __enter__(self) -> Output:
        if isinstance(self.folder, Remote):
            self.here = self._stack.enter_context(storage.scratch())
            there = storage.files_in(self.folder)
            storage.fetch({there[name]: self.here / name for name in (SETTINGS_NAME, JOURNAL, manifest.NAME) if name in there})
            self._version = there[JOURNAL].version if JOURNAL in there else ""
        self._own = manifest.own_columns(self.here)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with self._stack:
            if kind and issubclass(kind, UserError):  # the other file system may be why
                return
            self.publish()

    def pictures(self) -> dict[str, Place]:
        """The files in the folders of labels, as ``LABEL/NAME``."""
        if isinstance(self.folder, Path):
            by_label = {label: storage.files_in(self.folder / label) for label in LABELS}
            return {f"{label}/{name}": file for label, files in by_label.items() for name, file in files.items() if file.is_file()}
        found = storage.files_in(self.folder, below=True)  # one listing, and not one a label
        return {name: file for name, file in found.items() if name.count("/") == 1 and name.split("/")[0] in LABELS}

    def due(self) -> bool:
        """Whether to publish again: every 15 seconds, less often where that would take more than 5 % of the time."""
        return time.monotonic() - self._last > max(SECONDS_BETWEEN, self._took / LARGEST_SHARE)

    def write_manifest(self, patches: Iterable[Patch]) -> None:
        """Write the manifest, and publish it."""
        start = time.monotonic()
        manifest.write_manifest(self.here, patches, self._own)
        self.publish()
        self._took = self._last - start

    def publish(self) -> None:
        """Let what was written appear in the patch folder, the manifest last; nothing to do where it was written there.

        Raises UserError where another run has published in the meantime.
        """
        start = time.monotonic()
        if isinstance(self.folder, Remote):
            if self._version_there() != self._version:
                raise UserError(f"another extraction is writing to {self.folder}; wait for it, or use another --output_dir")
            for name in (SETTINGS_NAME, JOURNAL, FAILED_NAME, manifest.NAME):
                if (self.here / name).exists():
                    storage.store({self.here / name: self.folder / name})
            self._version = self._version_there()
        self._last = time.monotonic()
        self._took = self._last - start

    def _version_there(self) -> str:
        journal = storage.files_in(self.folder).get(JOURNAL)
        return journal.version if journal else ""


# ------------------------------------------------------------------------------------------------------------- a worker's tasks


def scan(job: Job) -> Scan | Failure:
    """``cutting.scan``, wherever the slide is."""
    return _on_this_machine(job, cutting.scan)


def cut(job: Job, candidates: list[Candidate], start: int, wanted: int, before: list[Cut]) -> Cutting | Failure:
    """``cutting.cut``, wherever slide and patches are. ``before``: the slide's patches so far.

    A slide that had to be fetched for this has its overlay drawn as well, which would mean to fetch it once more.
    """

    def work(here: Job) -> Cutting | Failure:
        outcome = cutting.cut(here, candidates, start, wanted)
        if isinstance(outcome, Failure) or here.path == job.path:
            return outcome
        return replace(outcome, drawn=cutting.draw_overlay(here, before + outcome.cuts) is None)

    return _on_this_machine(job, work)


def draw(job: Job, cuts: list[Cut]) -> Failure | None:
    """``cutting.draw_overlay``, wherever slide and picture are."""
    return _on_this_machine(replace(job, mask_path=None), lambda here: cutting.draw_overlay(here, cuts))


def _on_this_machine(job: Job, work: Callable[[Job], object]) -> object:
    """``work(job)`` with all paths of the job on this machine; what it wrote is stored unless it failed."""
    if not any(isinstance(item, Remote) for item in (job.path, job.mask_path, job.folder)):
        return work(job)
    with storage.scratch() as scratch:
        try:
            here = _brought(job, scratch)
        except storage.MissingError as error:
            return Failure(job.record.slide_id, "fetch", str(error))
        outcome = work(here)
        if isinstance(job.folder, Remote) and not isinstance(outcome, Failure):
            storage.store(
                _made(here.folder.rglob("*.*"), here.folder, job.folder) | _made([here.overlay], scratch, job.overlay.parent)
            )
        return outcome


def _brought(job: Job, scratch: Path) -> Job:
    """The job with everything that is elsewhere in ``scratch``."""
    paths = {"path": job.path, "mask_path": job.mask_path}
    here = {name: scratch / f"{name}{place.suffix}" for name, place in paths.items() if isinstance(place, Remote)}
    storage.fetch({paths[name]: target for name, target in here.items()})
    if isinstance(job.folder, Remote):
        here |= {"folder": scratch / "patches", "overlay": scratch / job.overlay.name}
    return replace(job, **here)


def _made(files: Iterable[Path], here: Path, target: Remote) -> dict[Path, Remote]:
    return {path: target / path.relative_to(here).as_posix() for path in files if path.is_file()}
