"""Patches of more slides than the disk holds: fetch slides, take their patches, delete them, within a bound on disk.

The result is that of fetching everything first. How many patches a slide gives is only known when all slides have been seen;
until then each gives its share of the slides seen so far, which can only shrink as more are seen, and the surplus is given
up. At the end the shares are worked out anew from the extraction's journal, in the rounds of the plain extraction; a slide that
turns out to be short is fetched a second time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.files import inside
from data.cutting import Job
from data.download import Downloader, Plan, free_disk, in_batches
from data.extract_report import report
from data.journal import Journal
from data.kaggle import Kaggle
from data.panda import IMAGE_FOLDERS, STREAMING, SlideRecord
from data.patches import ExtractResult, ExtractSettings, Run, check_folder, claim_folder, make_job
from data.reporting import Progress, gigabytes
from data.staging import Output
from data.subset import image_name, mask_name
from data.transfer import GaveUpError, Line, PartFile
from data.workers import cores

DEFAULT_MAX_DISK = 20e9
EXTRACT_FLAGS = ("output_dir", "max_patches", "max_per_slide", "patch_size", "level", "mpp", "min_tissue", "format")


@dataclass(frozen=True)
class Streamed:
    """One slide's files (name -> size) and the disk they take while they are here."""

    slide_id: str
    files: dict[str, int]
    room: int


class Room:
    """The bound on disk: bytes are taken before a slide is fetched and given back when it is deleted."""

    def __init__(self, limit: int, line: Line):
        self.limit, self.used, self.most = limit, 0, 0
        self._line, self._changed = line, threading.Condition()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes are free, then count them as used."""
        with self._changed:
            while self.used + size > self.limit:
                self._changed.wait(0.2)
                self._line.pause(0.0)
            self.used += size
            self.most = max(self.most, self.used)

    def give(self, size: int) -> None:
        """Count ``size`` bytes as free again."""
        with self._changed:
            self.used -= size
            self._changed.notify_all()


def main(kaggle: Kaggle, line: Line, plan: Plan, args: argparse.Namespace, progress: Progress) -> int:
    """``download_panda_data.py --stream``: say what will happen, then ``stream`` (not with --dry_run); the exit code."""
    given = {name: getattr(args, name) for name in EXTRACT_FLAGS if getattr(args, name) is not None}
    folder = args.data_dir / STREAMING
    settings = replace(ExtractSettings(data_dir=folder, workers=cores(), seed=args.seed, masks=args.masks), **given)
    max_disk = args.max_disk or DEFAULT_MAX_DISK
    downloader = Downloader(kaggle, line, folder, args.workers)
    files = {name: size for name, size in plan.files.items() if "/" in name}
    progress.log(f"way: {downloader.choose_way(len(files))}")
    patches = settings.max_patches * settings.patch_size**2 * 3
    free = free_disk(args.data_dir)
    progress.log(f"at most {gigabytes(max_disk)} of slides and {gigabytes(patches)} of patches on the disk; {gigabytes(free)} free")
    both = itertools.chain(folder.rglob("*"), settings.output_dir.rglob("*"))
    held = sum(path.stat().st_size for path in both if path.is_file())
    if free + held < max_disk + patches:
        raise UserError(f"{gigabytes(max_disk + patches)} may be needed; give a smaller --max_disk or fewer --max_patches")
    if args.dry_run:
        progress.log(downloader.measured(files, sum(files.values())))
        return 0
    folder.mkdir(exist_ok=True)
    return report(settings, stream(downloader, plan, settings, max_disk, progress))


def stream(downloader: Downloader, plan: Plan, settings: ExtractSettings, max_disk: float, progress: Progress) -> ExtractResult:
    """Take the patches of all slides of ``plan``; at most ``max_disk`` bytes of slides are on the disk at any moment.

    ``downloader`` fills ``settings.data_dir``. Stopped at any point, the same call goes on. Raises UserError, also at the end
    when slides did not arrive.
    """
    start, result = time.monotonic(), ExtractResult()
    slides = {item.slide_id: item for item in _slides(downloader, plan)}
    largest = max(item.room for item in slides.values())
    if largest > max_disk:
        raise UserError(f"--max_disk is smaller than the largest slide with its mask ({gigabytes(largest)}); give more")
    _clear(settings.data_dir, {name for item in slides.values() for name in item.files})
    output = Output(settings.output_dir)
    check_folder(settings, output)
    with Journal(settings.output_dir) as journal:
        claim_folder(settings, output)
        run = Run(settings, _jobs(settings, plan.slides, slides), journal, result, output)
        run.reconcile()
        visits = _Visits(downloader, run, Room(int(max_disk), downloader.line), progress)
        missing = visits.see_all(slides)
        if missing:
            raise UserError(f"{len(missing)} slide(s) did not arrive, the first is {missing[0]}; run the command again later")
        visits.settle(slides)
        run.finish()
    result.seconds = time.monotonic() - start
    return result


def _clear(folder: Path, wanted: set[str]) -> None:
    """Remove files, whole or half, that a stopped run left and are not ``wanted`` any more: their room is given to others."""
    kept = {file for name in wanted for file in PartFile(inside(folder, name)).files}
    for path in (path for name in IMAGE_FOLDERS for path in (folder / name).glob("*")):
        if path.is_file() and path not in kept:
            path.unlink()


def _slides(downloader: Downloader, plan: Plan) -> Iterator[Streamed]:
    for record in plan.slides:
        names = (image_name(record.slide_id), mask_name(record.slide_id))
        files = {name: plan.files[name] for name in names if name in plan.files}
        yield Streamed(record.slide_id, files, sum(downloader.room(name, size) for name, size in files.items()))


def _jobs(settings: ExtractSettings, records: Iterable[SlideRecord], slides: dict[str, Streamed]) -> dict[str, Job]:
    jobs = {}
    for record in sorted(records, key=lambda record: record.slide_id):
        mask = mask_name(record.slide_id)
        masked = inside(settings.data_dir, mask) if mask in slides[record.slide_id].files else None
        jobs[record.slide_id] = make_job(settings, record, inside(settings.data_dir, image_name(record.slide_id)), masked)
    return jobs


class _Visits:
    """Slides come, are worked on, and go."""

    def __init__(self, downloader: Downloader, run: Run, room: Room, progress: Progress):
        self.downloader, self.run, self.room, self.progress = downloader, run, room, progress

    def see_all(self, slides: dict[str, Streamed]) -> list[str]:
        """Scan every slide once and cut its share so far; return the ids of those that did not arrive."""
        here = {slide_id for slide_id, item in slides.items() if self._here(item)}
        seen = {slide_id for slide_id in slides if self.run.journal.known(slide_id).scan and slide_id not in here}
        for slide_id in seen:  # a mask may have been left behind by a run that was killed while it deleted
            for name in slides[slide_id].files:
                inside(self.downloader.folder, name).unlink(missing_ok=True)
        todo = [item for slide_id, item in slides.items() if slide_id not in seen]
        todo.sort(key=lambda item: item.slide_id not in here)  # what an earlier run left behind goes first
        return self._visit(todo, self._first_look)

    def settle(self, slides: dict[str, Streamed]) -> None:
        """Work out the shares anew, now that every slide is known, and fetch again what is short."""
        self.run.start_sharing()
        while short := self.run.share_out():
            missing = self._visit([slides[slide_id] for slide_id in short], self.run.cut_to_quotas)
            if missing:
                raise UserError(f"slide {missing[0]} did not arrive a second time; run the command again later")

    def _first_look(self, ids: list[str]) -> None:
        self.run.scan(ids)
        here = set(ids)
        self.run.start_sharing()
        while short := [slide_id for slide_id in self.run.share_out() if slide_id in here]:
            self.run.cut_to_quotas(short)
        self.run.trim()

    def _visit(self, todo: list[Streamed], work: Callable[[list[str]], None]) -> list[str]:
        """Fetch slides in the background, hand them to ``work`` in groups that fill half the room, and delete them."""
        arrived, failed = [], []
        files = {name: size for item in todo for name, size in item.files.items()}
        missing = self.downloader.missing(files)
        if missing:
            to_come = self.downloader.bytes_to_come(missing)
            self.progress.log(f"{len(todo)} slides, {gigabytes(to_come)} to come, {self.downloader.measured(missing, to_come)}")
            self.progress.start(to_come, len(files))
        with contextlib.closing(in_batches(todo, self._fetch, self.downloader.threads, self.downloader.line)) as batches:
            for batch in batches:
                for item, outcome in batch:
                    self._enter(item, outcome, arrived, failed)
                held = sum(item.room for item in arrived)
                if arrived and (held >= self.room.limit / 2 or (not batch and self.room.used <= held)):
                    self._work(arrived, work)
                    arrived = []
        self._work(arrived, work)
        return failed

    def _fetch(self, item: Streamed) -> dict[str, str]:
        self.room.take(item.room)
        return {name: self.downloader.fetch(name, size) for name, size in item.files.items()}

    def _enter(self, item: Streamed, outcome: object, arrived: list, failed: list) -> None:
        self.downloader.go_on_after(outcome)
        if isinstance(outcome, GaveUpError):
            self.downloader.line.log(f"failed: {outcome}")
            for path in (inside(self.downloader.folder, name) for name in item.files):  # its room is given to others
                path.unlink(missing_ok=True)
                PartFile(path).drop()
            self.room.give(item.room)
            failed.append(item.slide_id)
            return
        for name, checksum in outcome.items():
            self.downloader.ledger.enter(name, item.files[name], checksum)
            self.progress.file_done()
        arrived.append(item)

    def _work(self, arrived: list[Streamed], work: Callable[[list[str]], None]) -> None:
        if not arrived:
            return
        work(sorted(item.slide_id for item in arrived))
        for item in arrived:
            for name, size in item.files.items():
                inside(self.downloader.folder, name).unlink()
                self.downloader.ledger.enter(name, size, self.downloader.ledger.entries[name].checksum, "used")
            self.room.give(item.room)
        seen = sum(bool(self.run.journal.known(slide_id).scan) for slide_id in self.run.jobs)
        self.downloader.line.log(f"{seen} of {len(self.run.jobs)} slides have given their patches")

    def _here(self, item: Streamed) -> bool:
        image = inside(self.downloader.folder, image_name(item.slide_id))
        return image.exists() or PartFile(image).path.exists()
