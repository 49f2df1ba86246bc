"""The download as a whole: what is wanted, what is missing, which way to take, several files at once, never losing a byte."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from common.errors import UserError
from common.files import inside, write_text
from data.kaggle import AbsentError, Kaggle, RefusedError
from data.ledger import Ledger
from data.panda import SlideRecord, read_train_csv
from data.reporting import Progress, duration, gigabytes
from data.sources import Bundle, NotRangedError, SingleFiles, check_content, settle
from data.subset import choose, image_name, mask_name
from data.transfer import Address, DamagedError, GaveUpError, Line, PartFile, StoppedError

FEW_FILES = 60  # up to here single files stay well below Kaggle's rate limit, which has been met after about a hundred
SETTLING = 2  # files that are checked and flushed beside those that are being received
CHANGED = "was changed since it arrived: it stays as it is; move it away to have Kaggle's again"
TRIES_PER_FILE = 3  # how often a file may arrive damaged
LISTING = ".kaggle_listing.json"
LISTING_DAYS = 7.0
SPARE_DISK = 200_000_000


@dataclass(frozen=True)
class Selection:
    """What the user wants. num_slides, grades, providers, ids: None for all. masks: with their label masks.

    streamed: slides are for patches alone, which are not taken from those that are known to be bad.
    """

    num_slides: int | None = None
    grades: tuple[int, ...] | None = None
    providers: tuple[str, ...] | None = None
    ids: tuple[str, ...] | None = None
    masks: bool = True
    include_bad: bool = False
    seed: int = 0
    streamed: bool = False

    @property
    def everything(self) -> bool:
        """Whether no slide is left out."""
        return self.num_slides is None and self.grades is None and self.providers is None and self.ids is None


@dataclass(frozen=True)
class Plan:
    """files: name -> size of all that is wanted, in order. bad: left out, id -> reason. absent: chosen, but not in the listing."""

    files: dict[str, int]
    slides: list[SlideRecord]
    bad: dict[str, str]
    absent: list[str]


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Only one download fills a folder at a time; a second one waits for the first and then finds most of it done."""
    lock = filelock.FileLock(Path(folder) / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another download is filling {folder}; waiting for it to end")
        lock.acquire()
    try:
        sweep(folder)
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Remove what a killed run left beside its half files: notes never finished, content never checked. The folder is locked."""
    for pattern in (".*.part.json.*.tmp", f".{LISTING}.*.tmp", "*.unpacked"):
        for path in Path(folder).rglob(pattern):
            path.unlink(missing_ok=True)


def read_listing(kaggle: Kaggle, folder: Path, fresh: bool = False, keep: bool = True) -> dict[str, int]:
    """Name -> size of all files of the competition, kept in ``folder`` for some days.

    fresh: ask Kaggle in any case. keep: write it down, unless it is cut short. Raises UserError for a name that would leave the
    folder.
    """
    cache = Path(folder) / LISTING
    if not fresh and cache.exists() and time.time() - cache.stat().st_mtime < LISTING_DAYS * 86400:
        with contextlib.suppress(ValueError, TypeError, AttributeError, OSError):  # damaged: asked for again
            return {str(name): int(size) for name, size in json.loads(cache.read_text("utf-8")).items() if inside(folder, name)}
    listing = kaggle.list_files()
    for name in listing:
        inside(folder, name)
    if keep and "train.csv" in listing:
        write_text(cache, json.dumps(listing, indent=0))
    return listing


def forget_listing(folder: Path) -> None:
    """Ask Kaggle for the list again next time: it lacks slides that train.csv has."""
    (Path(folder) / LISTING).unlink(missing_ok=True)


def make_plan(listing: dict[str, int], records: list[SlideRecord], selection: Selection) -> Plan:
    """Names and sizes of what ``selection`` asks for; tables first, then slide after slide, each followed by its mask."""
    slides, bad = choose(
        records,
        selection.num_slides,
        selection.grades,
        selection.providers,
        selection.ids,
        selection.include_bad or (selection.everything and not selection.streamed),
        selection.seed,
    )
    if bad and not slides:
        raise UserError(f"all {len(bad)} chosen slides are known to be bad ({next(iter(bad.values()))}); choose others")
    if not slides:
        raise UserError("no slide is left after --grades, --providers and --ids; widen them")
    absent = [record.slide_id for record in slides if image_name(record.slide_id) not in listing]
    slides = [record for record in slides if image_name(record.slide_id) in listing]
    if not slides:
        raise UserError(f"none of the {len(absent)} chosen slides is in Kaggle's list, the first is {absent[0]}; choose others")
    names = [name for name in listing if "/" not in name] if selection.everything else ["train.csv"]
    for record in slides:
        names += [image_name(record.slide_id), *([mask_name(record.slide_id)] if selection.masks else [])]
    if selection.everything:  # whatever else Kaggle lists
        names += [name for name in listing if selection.masks or not name.startswith("train_label_masks/")]
    return Plan({name: listing[name] for name in names if name in listing}, slides, bad, absent)


class Downloader:
    """Fetches files of one competition into ``folder``, which must be ``locked``. Say what is wrong, or nothing was lost."""

    def __init__(self, kaggle: Kaggle, line: Line, folder: Path, workers: int):
        self.ledger = Ledger(folder)
        self.line, self.folder, self._workers, self.threads = line, Path(folder), workers, workers + SETTLING
        self._failed_in_a_row = 0
        self._kaggle, self._singles, self._bundle = kaggle, SingleFiles(line, kaggle.sign_file), None
        self._opening, self._openings_left = threading.Lock(), 2
        # A worker holds a connection while it receives; checking and flushing go on beside the next file.
        self._connections = threading.Semaphore(workers)

    def choose_way(self, count: int) -> str:
        """Open the bundle when ``count`` files are many; return the way to be taken, for the user."""
        if count <= FEW_FILES:
            return "single files (few enough for Kaggle's rate limit)"
        try:
            self._bundle = Bundle(self.line, Address(self._kaggle.sign_bundle))
        except (NotRangedError, GaveUpError, RefusedError) as error:  # what is asked for one by one may still be given
            return f"single files, as fast as Kaggle's rate limit allows ({error})"
        return "ranges of the competition's bundle (one address, no rate limit per file)"

    def speed(self, files: dict[str, int]) -> float:
        """Bytes a second of one connection, measured on at most 8 MiB or a hundredth of ``files``."""
        size = min(8 << 20, max(1 << 16, sum(files.values()) // 100))
        name = max(files, key=files.get)
        start, before = time.monotonic(), self.line.received
        try:
            (self._bundle or self._singles).probe(name, min(size, files[name]))
        except NotRangedError as error:
            self._open_anew(self._bundle, error)
            return self.speed(files)
        return (self.line.received - before) / max(time.monotonic() - start, 1e-3)

    def measured(self, files: dict[str, int], to_come: int) -> str:
        """How long ``to_come`` bytes take at the speed of one connection, for the user."""
        speed = self.speed(files)
        return f"about {duration(to_come / speed)} at the measured {gigabytes(speed)}/s"

    def missing(self, files: dict[str, int]) -> dict[str, int]:
        """The files that have not arrived whole. A train.csv that was changed here is not missing: the corrections stay."""
        return {name: size for name, size in files.items() if not self.ledger.has(name, size) and not self._edited(name)}

    def _edited(self, name: str) -> bool:
        entry, path = self.ledger.entries.get(name), self.folder / name
        return (
            name == "train.csv"
            and entry is not None
            and entry.state == "whole"
            and path.is_file()
            and path.stat().st_size != entry.size
        )

    def bytes_to_come(self, files: dict[str, int]) -> int:
        """Bytes of ``files`` less what their half files already hold, and what only has to be checked."""
        return sum(
            max(0, size - PartFile(inside(self.folder, name)).size)
            for name, size in files.items()
            if not (self._may_be_whole(name) and inside(self.folder, name).stat().st_size == size)
        )

    def _may_be_whole(self, name: str) -> bool:
        """Whether a file lies there that was there before us, or whose line in the ledger was lost."""
        entry = self.ledger.entries.get(name)
        return inside(self.folder, name).is_file() and (entry is None or entry.state == "whole")

    def fetch(self, name: str, size: int) -> str:
        """Make one file whole; return its checksum. Not entered in the ledger. Raises GaveUpError, RefusedError or UserError."""
        final = inside(self.folder, name)
        known = f"crc32:{self._bundle.members[name].crc:08x}" if self._bundle and name in self._bundle.members else None
        if self._may_be_whole(name):
            with contextlib.suppress(DamagedError):
                return check_content(final, name, size, known)
        part = PartFile(final)
        for attempt in range(1, TRIES_PER_FILE + 1):
            with self._connections:
                self._pull(name, size, part)
            try:
                return settle(part, name, size)
            except DamagedError as problem:
                self.line.log(f"{name}: {problem}; fetching it again ({attempt} of {TRIES_PER_FILE})")
                reason = problem
        raise GaveUpError(f"{name}: {reason}, {TRIES_PER_FILE} times; run the command again later")

    def _pull(self, name: str, size: int, part: PartFile) -> None:
        bundle = self._bundle
        if bundle and name in bundle.members:
            try:
                return bundle.pull(name, size, part)
            except NotRangedError as error:
                self._open_anew(bundle, error)
                return self._pull(name, size, part)
        return self._singles.pull(name, size, part)

    def _open_anew(self, bundle: Bundle, error: NotRangedError) -> None:
        """After a bundle that gave no part: it may be another one by now. Twice at most, then single files it is."""
        with self._opening:
            if self._bundle is not bundle:
                return  # another thread was here
            another = None
            while self._openings_left and another is None:
                self._openings_left -= 1
                with contextlib.suppress(NotRangedError, GaveUpError, RefusedError):
                    another = Bundle(self.line, Address(self._kaggle.sign_bundle))
            self._bundle = another
            self.line.log(f"{error}; " + ("opened it anew" if another else "going on with single files"))

    def room(self, name: str, size: int) -> int:
        """Bytes of disk that one file takes at most while it is fetched: a packed one lies beside its content for a moment."""
        member = self._bundle.members.get(name) if self._bundle else None
        return size + (member.packed_size if member and member.method else 0)

    def fetch_all(self, files: dict[str, int]) -> Iterator[tuple[str, str | UserError]]:
        """Fetch ``files``, several at once; yield (name, checksum or what was wrong) as they end, the ledger having been kept.

        One file that cannot be had does not stop the rest; several in a row, or a refusal, do.
        """
        with contextlib.closing(in_batches(files.items(), lambda item: self.fetch(*item), self.threads, self.line)) as batches:
            for (name, size), outcome in itertools.chain.from_iterable(batches):
                if isinstance(outcome, str):
                    self.ledger.enter(name, size, outcome)
                self.go_on_after(outcome)
                yield name, outcome

    def go_on_after(self, outcome: object) -> None:
        """Raise what went wrong when it will go wrong with the next file too: a refusal, or several failures in a row."""
        if not isinstance(outcome, UserError):
            self._failed_in_a_row = 0
            return
        self._failed_in_a_row += not isinstance(outcome, AbsentError)
        if not isinstance(outcome, GaveUpError) or self._failed_in_a_row > max(2, self._workers):
            raise outcome

    def train_csv(self, listing: dict[str, int]) -> list[SlideRecord]:
        """Rows of train.csv, fetched first when it is not there: it decides what else is wanted."""
        if "train.csv" not in listing:
            raise UserError("Kaggle's file list has no train.csv; it may be incomplete today, try again later")
        there = self.folder / "train.csv"
        if there.exists() and "train.csv" not in self.ledger.entries and there.stat().st_size != listing["train.csv"]:
            raise UserError(f"{there} is not Kaggle's; move it away or give another --data_dir")
        if self._edited("train.csv"):
            self.line.log(f"{there} {CHANGED}")
        for _, outcome in self.fetch_all(self.missing({"train.csv": listing["train.csv"]})):
            if isinstance(outcome, UserError):
                raise outcome
        return read_train_csv(self.folder / "train.csv")


def in_batches(items: Iterable, work: Callable, threads: int, line: Line) -> Iterator[list[tuple]]:
    """Yield lists of (item, result or UserError) of ``work(item)`` as they end; an empty one after half a second without any.

    Bugs are raised. Leaving early stops the threads. They are daemons: a stalled connection must not keep a stopped program
    alive, and a half file is good at any moment.
    """
    waiting, done = queue.SimpleQueue(), queue.SimpleQueue()
    items = list(items)
    for item in items:
        waiting.put(item)

    def run():
        while not line.stop.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((item, work(item)))
            except StoppedError:
                return
            except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
                done.put((item, error))

    pool = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in pool:
        thread.start()
    left = len(items)
    try:
        while left:
            batch = _ended(done)
            left -= len(batch)
            for _, outcome in batch:
                if isinstance(outcome, BaseException) and not isinstance(outcome, UserError):
                    raise outcome
            yield batch
    finally:
        line.stop.set()
        for thread in pool:
            thread.join(timeout=2.0)
        if not left:
            line.stop.clear()


def _ended(done: queue.SimpleQueue) -> list[tuple]:
    batch = []
    with contextlib.suppress(queue.Empty):
        batch.append(done.get(timeout=0.5))
        while True:
            batch.append(done.get_nowait())
    return batch


def free_disk(folder: Path) -> int:
    """Free bytes where ``folder`` is or will be."""
    folder = Path(folder).resolve()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def check_disk(folder: Path, needed: int, missing: dict[str, int], slides: int) -> None:
    """Raise UserError with the way out when the disk cannot hold ``needed`` more bytes. slides: how many are wanted in all."""
    free = free_disk(folder)
    spare = min(SPARE_DISK, needed // 20)
    if needed + spare <= free:
        return
    to_come = sum(name.startswith("train_images/") for name in missing)
    fit = slides - to_come + max(0, int(to_come * (free - spare) / max(needed, 1)))
    smaller = f"--num_slides {fit} would fit, " if fit else ""
    raise UserError(
        f"{gigabytes(needed)} are to come and {folder} has {gigabytes(free)} free; {smaller}"
        "--stream needs a few GB for any number of slides, or give another --data_dir"
    )


def announce(plan: Plan, wanted: int | None, log: Callable[[str], None]) -> None:
    """Say what is fetched, what is left out, and why. wanted: the number of slides asked for."""
    strata = Counter((record.data_provider, record.isup_grade) for record in plan.slides)
    for provider in sorted({provider for provider, _ in strata}):
        log(f"{provider}: " + ", ".join(f"grade {grade}: {strata[provider, grade]}" for grade in range(6)) + " slides")
    for slide_id, reason in plan.bad.items():
        log(f"left out {slide_id}: {reason}")
    if wanted and len(plan.slides) < wanted:
        log(f"--num_slides {wanted}: train.csv has no more than {len(plan.slides)} that are fit and chosen")
    if plan.absent:
        log(
            f"{len(plan.absent)} slides of train.csv are not in Kaggle's file list, the first is {plan.absent[0]}; the list may "
            "have been cut short, and the next run asks for it again"
        )
    log(f"{len(plan.slides)} slides, {len(plan.files)} files, {gigabytes(sum(plan.files.values()))} in all")


def fetch_missing(downloader: Downloader, missing: dict[str, int], progress: Progress) -> None:
    """Fetch ``missing`` with progress. Raises UserError at the end when files did not arrive."""
    progress.start(downloader.bytes_to_come(missing), len(missing))
    failed = 0
    with contextlib.closing(downloader.fetch_all(missing)) as arrivals:
        for _, outcome in arrivals:
            if isinstance(outcome, UserError):
                failed += 1
                progress.log(f"failed: {outcome}")
            else:
                progress.file_done()
    if failed:
        raise UserError(
            f"{failed} of {len(missing)} files did not arrive (named above); the rest is kept, run the command again later"
        )
    progress.log(f"all {len(missing)} files arrived whole in {downloader.folder}")
