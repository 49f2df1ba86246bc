"""From a folder of slides to a folder of labelled patches, exactly as many as wanted where there is enough tissue.

Slides are scanned first (tissue, candidates), then the wanted number is spread over provider, grade and slides, then each
slide is cut. Places that turn out blank, blurred or inked at full resolution are replaced by the slide's next candidates, then by
other slides', round by round. What each slide gives depends on nothing but the slide, the settings and its share, so a run
that was stopped, or killed, continues and ends with the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from common.cli import existing_folder
from common.errors import UserError
from common.files import remove_leftovers, write_csv, write_text
from common.progress import say, track
from common.seeding import derive_seed
from common.storage import Place, brought, contains, files_in, remove, scratch, size_of, sweep
from data import manifest, staging
from data.allocation import Supply, allocate
from data.cutting import Cut, Cutting, Failure, Job, Scan, file_stem, fingerprint, relative_path
from data.findings import is_text, printable
from data.journal import Journal, Known
from data.manifest import Patch
from data.panda import IMAGE_FOLDERS, KNOWN_BAD, LABELS, PROVIDERS, SlideRecord, read_train_csv, split_by_slide
from data.quarantine import set_aside_before
from data.slides import slide_files, slides_among
from data.staging import FAILED_NAME, SETTINGS_NAME, Output
from data.workers import WorkerDied, run_jobs, run_on_cluster

FORMATS = ("png", "jpg")
SET_ASIDE = "set aside by check_data.py"  # among the reasons why a place gives no patch


@dataclass(frozen=True)
class ExtractSettings:
    """What is extracted. Folders (of this machine or elsewhere) apart, units: patch_size in pixels of the patch, mpp in micrometres
    per pixel (then ``level`` is not used), min_tissue as a share 0..1, max_per_slide None for no limit, workers 0 for none but this
    process, scheduler the address of a Dask cluster that works instead of them, masks whether to label by masks."""

    data_dir: Place = Path("datasets/panda")
    output_dir: Place = Path("datasets/patches")
    patch_size: int = 256
    level: int = 0
    mpp: float | None = None
    max_patches: int = 10_000
    max_per_slide: int | None = None
    min_tissue: float = 0.5
    workers: int = 1
    seed: int = 0
    format: str = "png"
    scheduler: str | None = None
    masks: bool = True


@dataclass
class ExtractResult:
    """What came of it. empty: slides without a patch and why. left_out: reasons with the number of slides. rejected: places on
    tissue that were not used, by reason. made: patches cut by this run; seconds: how long it took."""

    patches: list[Patch] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    empty: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    slides: int = 0
    made: int = 0
    seconds: float = 0.0


def overlay_folder(output_dir: Place) -> Place:
    """Where overlays lie: beside the patch folder, since inside it ImageFolder would take them for a class."""
    resolved = output_dir.resolve()
    return resolved.parent / "overlays" / resolved.name


def extract(settings: ExtractSettings) -> ExtractResult:
    """Run the whole extraction, or continue it. Raises UserError where the folders or settings do not allow it."""
    start = time.monotonic()
    result = ExtractResult()
    if settings.scheduler:  # its workers run in other folders
        settings = replace(settings, data_dir=settings.data_dir.resolve(), output_dir=settings.output_dir.resolve())
    jobs = find_slides(settings, result)
    with contextlib.ExitStack() as stack:
        stack.callback(sweep)  # workers that were ended leave their slide behind
        output = stack.enter_context(Output(settings.output_dir))
        check_folder(settings, output)
        journal = stack.enter_context(Journal(output.here))
        claim_folder(settings, output)
        run = Run(settings, jobs, journal, result, output)
        run.reconcile()
        run.scan()
        run.cut()
        run.finish()
        run.draw()
    result.seconds = time.monotonic() - start
    return result


# ------------------------------------------------------------------------------------------------------------------ slides


def find_slides(settings: ExtractSettings, result: ExtractResult) -> dict[str, Job]:
    """Jobs by slide id, in the order of the ids: PANDA's layout where there is a train.csv, else every slide in the folder."""
    folder = settings.data_dir
    if isinstance(folder, Path):
        existing_folder(folder, "slides", "download them (download_panda_data.py) or name their folder with --data_dir")
    beside = files_in(folder)
    files = _by_id(_nameable(slide_files(folder / "train_images") + slides_among(beside.values())))
    records = (
        _panda_records(beside["train.csv"], files, result) if "train.csv" in beside else {name: SlideRecord(name) for name in files}
    )
    _say_what_lies_deeper(folder, bool(records))
    masks = files_in(folder / "train_label_masks")
    _say_what_stays_unlabelled(records, masks)
    return {
        slide_id: make_job(settings, records[slide_id], files[slide_id], masks.get(f"{slide_id}_mask.tiff"))
        for slide_id in sorted(records)
    }


def _nameable(files: list[Place]) -> list[Place]:
    strange = [file for file in files if not is_text(file.name)]
    if strange:
        say(f"warning: {len(strange)} slide(s) left out whose names are no plain text, rename them: {printable(strange[0].name)}")
    return [file for file in files if is_text(file.name)]


def _say_what_lies_deeper(folder: Place, found: bool) -> None:
    """Slides in sub-folders are not searched: say so, or raise UserError where there are no others."""
    below = [entry for entry in folder.iterdir() if entry.is_dir()] if isinstance(folder, Path) else []
    below = [entry for entry in below if os.access(entry, os.R_OK | os.X_OK)]  # not a disk's lost+found
    deeper = {entry.name: len(slide_files(entry)) for entry in below if entry.name not in IMAGE_FOLDERS}
    deeper = {name: count for name, count in deeper.items() if count}
    note = f"sub-folders are not searched: {sum(deeper.values())} file(s) named like slides lie in {', '.join(sorted(deeper))}"
    if not found:
        way_out = f"{note}; name" if deeper else "put slides there or name"
        raise UserError(f"no slides in {folder}; {way_out} another folder with --data_dir")
    if deeper:
        say(f"note: {note}")


def _say_what_stays_unlabelled(records: dict[str, SlideRecord], masks: dict[str, Place]) -> None:
    named = {slide_id: record for slide_id, record in records.items() if record.data_provider}
    without = [slide_id for slide_id in named if f"{slide_id}_mask.tiff" not in masks]
    if without:
        say(f"{len(without)} slide(s) of train.csv have no train_label_masks/ID_mask.tiff: their patches stay unlabelled")
    strange = {record.data_provider for slide_id, record in named.items() if slide_id not in without} - set(PROVIDERS)
    if strange:
        say(
            f"masks of {', '.join(sorted(strange))} are not read (data_provider in train.csv; known: {' and '.join(PROVIDERS)}): "
            "patches of these slides stay unlabelled"
        )


def make_job(settings: ExtractSettings, record: SlideRecord, path: Place, mask: Place | None) -> Job:
    """What a worker must know about one slide."""
    return Job(
        record,
        path,
        mask,
        settings.output_dir,
        overlay_folder(settings.output_dir) / f"{file_stem(record.slide_id)}.jpg",
        settings.patch_size,
        settings.level,
        settings.mpp,
        settings.min_tissue,
        settings.seed,
        settings.format,
    )


def _by_id(paths: list[Place]) -> dict[str, Place]:
    """Slide id (the file's name without its ending) -> file; where two would have the same id, later ones keep the ending."""
    files: dict[str, Place] = {}
    for path in paths:
        files[path.stem if path.stem not in files else path.name] = path
    return files


def _panda_records(table: Place, files: dict[str, Place], result: ExtractResult) -> dict[str, SlideRecord]:
    """Records of the slides that are on the disk and fit for use; what is left out is counted in ``result.left_out``."""
    records: dict[str, SlideRecord] = {}
    left_out: Counter = Counter()
    with scratch() as folder:
        rows = read_train_csv(brought(table, folder))
    for record in rows:
        if record.slide_id in KNOWN_BAD:
            left_out[f"known to be bad ({KNOWN_BAD[record.slide_id]})"] += 1
        elif record.slide_id in records:
            left_out["named twice in train.csv (the first line counts)"] += 1
        elif record.slide_id not in files:
            left_out["in train.csv but not on the disk"] += 1
        else:
            records[record.slide_id] = record
    strangers = {name: SlideRecord(name) for name in files if name not in records and name not in KNOWN_BAD}
    if strangers:
        say(f"{len(strangers)} slide(s) on the disk are not in {table.name}: their patches stay unlabelled")
    result.left_out = dict(left_out)
    return records | strangers


# ---------------------------------------------------------------------------------------------------------------- settings


def _fixed(settings: ExtractSettings) -> dict:
    """The settings that must stay the same when a folder is used again."""
    values = asdict(settings) | {"data_dir": str(settings.data_dir.resolve())}
    return {name: values[name] for name in values if name not in {"output_dir", "workers", "max_patches", "scheduler"}}


def check_folder(settings: ExtractSettings, output: Output) -> None:
    """Make the output folder, or check that it was made with the same settings. Raises UserError where it cannot be used."""
    folder, path = settings.output_dir, output.here / SETTINGS_NAME
    try:
        output.here.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(json.loads(path.read_text(encoding="utf-8"))["settings"], settings)
        elif settings.output_dir.resolve() == settings.data_dir.resolve() or any(
            contains(settings.data_dir / name, settings.output_dir) for name in IMAGE_FOLDERS
        ):
            raise UserError(f"{folder} is where the slides are; name another --output_dir for the patches")
        elif {manifest.NAME, *LABELS} & {name.split("/")[0] for name in files_in(folder, below=True)}:
            raise UserError(f"{folder} holds patches but no {SETTINGS_NAME}; use another --output_dir")
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / SETTINGS_NAME} is damaged ({error}); use another --output_dir") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be used as --output_dir ({error.strerror}); name a folder that can be written") from error


def claim_folder(settings: ExtractSettings, output: Output) -> None:
    """Write extract.json, once the journal is locked: a run that is refused must leave no settings behind.

    What a killed run was in the middle of writing goes.
    """
    for name in (SETTINGS_NAME, FAILED_NAME, manifest.NAME):
        remove_leftovers(output.here, name, locked=True)
    found = {"settings": _fixed(settings) | {"max_patches": settings.max_patches}, "versions": _versions()}
    write_text(output.here / SETTINGS_NAME, json.dumps(found, indent=2))
    output.publish()


def _check_same(before: dict, settings: ExtractSettings) -> None:
    before = {"masks": settings.masks} | before  # folders made before this was written down say nothing
    different = [name for name, value in _fixed(settings).items() if before[name] != value]
    if "data_dir" in different and isinstance(settings.data_dir, Path) and not Path(before["data_dir"]).exists():
        different.remove("data_dir")  # the slides were moved; the journal knows those that are not the same
    if settings.max_patches < int(before["max_patches"]):
        different.append("max_patches")  # more can be added later, fewer would mean to delete
    if different:
        named = ", ".join(f"{name} {before[name]}" for name in different)
        same = "at least as many" if different == ["max_patches"] else "the same settings again"
        raise UserError(f"{settings.output_dir} was made with {named}; use {same} or another --output_dir")


def _versions() -> dict[str, str]:
    names = ("openslide-python", "openslide-bin", "tifffile", "imagecodecs", "pillow", "numpy", "scipy")
    found = {}
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):  # PackageNotFoundError is one
            found[name] = version(name)
    return found


# ----------------------------------------------------------------------------------------------------------------- the run


class Run:
    """One extraction under way: the journal, what each slide has given so far, and who failed.

    The slides may come and go (see data.stream): scan and cut those that are there, trim at any time.
    """

    def __init__(self, settings: ExtractSettings, jobs: dict[str, Job], journal: Journal, result: ExtractResult, output: Output):
        self.settings, self.jobs, self.journal, self.result, self.output = settings, jobs, journal, result, output
        sides = {slide_id: known.side for slide_id, known in journal.slides.items() if known.side} | _sides_written(output.here)
        self.splits = split_by_slide([job.record for job in jobs.values()], known=sides)
        self.aside = set_aside_before(settings.output_dir) if isinstance(settings.output_dir, Path) else set()
        self.back: dict[str, Patch] = {}
        self.start_sharing()
        self.failed: dict[str, Failure] = {}

    def reconcile(self) -> None:
        """Forget what changed or vanished since the journal was written, then remove our files that no row will name.

        Raises UserError, and removes nothing, where slides that gave patches are gone or can no longer be read.
        """
        self._check_all_there()
        self._scan_changed()
        present = {name for name, file in self.output.pictures().items() if size_of(file)}
        self.back = self._brought_back(present)
        self.aside -= self.back.keys()
        for slide_id, known in self.journal.slides.items():
            given = {self._path(slide_id, item) for item in known.cuts}
            back_here = {path for path in self.back.keys() - given if _is_ours(Path(path).name, {file_stem(slide_id): known})}
            kept = [item for item in known.cuts if (path := self._path(slide_id, item)) in present or path not in self.aside]
            if back_here or any(self._path(slide_id, item) not in present for item in kept):
                known.cuts, known.next_index, known.rejected = [], 0, {}
            elif len(kept) < len(known.cuts):
                self._give_up(slide_id, kept)
        if present:
            self._write_manifest()
            self._remove_strays()

    def _brought_back(self, present: set[str]) -> dict[str, Patch]:
        """Patches that check_data.py had set aside and that lie in the folder again with their rows, by path."""
        if not self.aside & present or not (self.output.here / manifest.NAME).exists():
            return {}
        return {row.path: row for row in manifest.read_manifest(self.output.here) if row.path in self.aside & present}

    def _check_all_there(self) -> None:
        gone = {
            slide_id: len(known.cuts) for slide_id, known in self.journal.slides.items() if known.cuts and slide_id not in self.jobs
        }
        if gone:
            raise UserError(
                f"{len(gone)} slide(s) that gave {sum(gone.values())} patches of {self.settings.output_dir} are no longer among "
                f"the slides (the first is {min(gone)}), and the patches would go with them; bring them back, choose them again, "
                "or use another --output_dir"
            )

    def _scan_changed(self) -> None:
        """Scan anew the slides that gave patches and are not what they were."""
        changed = []
        for slide_id, job in self.jobs.items():
            known = self.journal.known(slide_id)
            if known.scan and known.fingerprint != _fingerprints(job) and _is_here(job):
                if known.cuts:
                    changed.append(job)
                else:
                    known.scan, known.next_index = None, 0
            elif known.scan and job.mask_path and not _is_here(job) and known.fingerprint[4:] not in ([], _labelled_by(job)):
                say(f"slide {slide_id} has another row in train.csv than when it gave patches: it is fetched and cut again")
                known.scan, known.next_index = None, 0
        self._check_still_labelled(changed)
        if changed:
            say(f"{len(changed)} slide(s) changed since they gave patches (slide, mask, or row of train.csv): they are cut again")
        self._scan_jobs(changed)
        lost = {job.record.slide_id for job in changed} & self.failed.keys()
        if lost:
            raise UserError(
                f"{len(lost)} slide(s) that gave patches of {self.settings.output_dir} can no longer be read (see above), and the "
                "patches would go with them; bring them back as they were, or use another --output_dir"
            )

    def _check_still_labelled(self, changed: list[Job]) -> None:
        lost = [
            job.record.slide_id
            for job in changed
            if not (job.mask_path and job.record.data_provider in PROVIDERS)
            and any(item.label != "unlabelled" for item in self.journal.known(job.record.slide_id).cuts)
        ]
        if lost:
            raise UserError(
                f"{len(lost)} slide(s) that gave labelled patches of {self.settings.output_dir} no longer have a mask, or a row in "
                f"train.csv (the first is {min(lost)}), and the labels would be lost; bring them back, or use another --output_dir"
            )

    def _give_up(self, slide_id: str, kept: list[Cut]) -> None:
        """Go on without patches that check_data.py set aside: the slide's next places take their turn."""
        known = self.journal.known(slide_id)
        rejected = Counter(known.rejected) + Counter({SET_ASIDE: len(known.cuts) - len(kept)})
        self.journal.record_cuts(slide_id, kept, known.next_index, dict(rejected))

    def scan(self, among: Iterable[str] | None = None) -> None:
        """Scan the slides that are new or changed, of all or ``among`` some."""
        wanted = self.jobs if among is None else set(among)
        todo = [job for slide_id, job in self.jobs.items() if slide_id in wanted and not self.journal.known(slide_id).scan]
        if todo:
            say(f"scanning {len(todo)} of {len(self.jobs)} slides for tissue")
        self._scan_jobs(todo)

    def _scan_jobs(self, todo: list[Job]) -> None:
        for job, outcome in self._work(staging.scan, todo, "scan"):
            if isinstance(outcome, Scan):
                slide_id = job.record.slide_id
                self.journal.record_scan(slide_id, _fingerprints(job), outcome, self.splits[slide_id])
                if self.output.due():
                    self.output.publish()

    def cut(self) -> None:
        """Share out and cut, round by round, until the number is reached or the candidates end."""
        while short := self.share_out():
            self.cut_to_quotas(short)

    def cut_to_quotas(self, short: list[str]) -> None:
        """Cut what some slides are short of."""
        tasks = [(self.jobs[slide_id], *self._rest(slide_id)) for slide_id in short]
        say(f"cutting {sum(task[3] for task in tasks)} patches from {len(tasks)} slides")
        for (job, *_), outcome in self._work(_cut_task, tasks, "cut"):
            if isinstance(outcome, Cutting):
                self._add(job.record.slide_id, outcome)

    def finish(self) -> None:
        """Write the manifest and failed_slides.csv; remove patches that another share-out had made."""
        self.back = {}
        self.result.patches = sorted(self._patches(), key=lambda patch: patch.path)
        self.output.write_manifest(self.result.patches)
        self.trim()
        self.result.failed = sorted(self.failed.values(), key=lambda failure: failure.slide_id)
        _write_failed(self.output.here / FAILED_NAME, self.result.failed)
        self.output.publish()
        self._summarise()

    def trim(self) -> None:
        """Give up what lies beyond the quotas: first the journal and the manifest, then the files."""
        for slide_id in self.jobs:
            known = self.journal.known(slide_id)
            if len(known.cuts) > self.quotas[slide_id]:
                kept = known.cuts[: self.quotas[slide_id]]
                self.journal.record_cuts(slide_id, kept, kept[-1].index + 1 if kept else 0, known.rejected)
        self._write_manifest()
        self._remove_strays()

    def draw(self) -> None:
        """Draw the overlays that are missing or show other patches than the chosen ones."""
        folder, tasks = overlay_folder(self.settings.output_dir), []
        if isinstance(folder, Path) and not _can_be_written(folder):
            say(f"warning: {folder} cannot be written, so there are no pictures of slides with their patches")
            return
        if isinstance(folder, Path):
            remove_leftovers(folder, locked=True)
        there = files_in(folder)
        for slide_id, job in self.jobs.items():
            known = self.journal.known(slide_id)
            current = known.drawn == _digest(known.cuts) and job.overlay.name in there
            if known.scan and slide_id not in self.failed and not current:
                tasks.append((job, known.cuts))
        for (job, cuts), outcome in self._work(_draw_task, tasks, "draw"):
            if outcome is None:
                self.journal.record_overlay(job.record.slide_id, _digest(cuts))

    def _work(self, function: Callable, tasks: list, what: str) -> Iterator[tuple]:
        """Run tasks in workers with progress; failures are set aside and said, everything else is yielded."""
        if not tasks:
            return
        if self.settings.scheduler:
            results = run_on_cluster(function, tasks, self.settings.scheduler)
        else:
            results = run_jobs(function, tasks, min(self.settings.workers, len(tasks)))
        with contextlib.closing(results):
            for task, outcome in track(results, what, len(tasks), "slides"):
                job = task if isinstance(task, Job) else task[0]
                if isinstance(outcome, WorkerDied):
                    reason = "its worker process died twice: a crash in the decoder, or not enough memory (try fewer --workers)"
                    outcome = Failure(job.record.slide_id, what, reason)
                if isinstance(outcome, Failure) and what == "draw":
                    say(f"warning: slide {outcome.slide_id} keeps its patches and has no overlay: {outcome.reason}")
                elif isinstance(outcome, Failure):
                    self.failed[outcome.slide_id] = outcome
                    count = len(self.journal.known(outcome.slide_id).cuts)
                    what_of_it = f"gives no more than the {count} patches that it gave before" if count else "left out"
                    say(f"warning: slide {outcome.slide_id} {what_of_it} ({outcome.stage}): {outcome.reason}")
                else:
                    yield task, outcome

    def start_sharing(self) -> None:
        """Forget the quotas: the next rounds are those of an extraction that begins, whatever the journal knows."""
        self.quotas = dict.fromkeys(self.jobs, 0)

    def share_out(self) -> list[str]:
        """Set the quotas; return the slides that still have candidates to cut for theirs."""
        usable = [slide_id for slide_id in self.jobs if self.journal.known(slide_id).scan]
        usable.sort(key=lambda slide_id: derive_seed(self.settings.seed, f"share/{slide_id}"))
        supplies = [self._supply(slide_id) for slide_id in usable]
        self.quotas = dict.fromkeys(self.jobs, 0) | dict(zip(usable, allocate(self.settings.max_patches, supplies), strict=True))
        return sorted(slide_id for slide_id in usable if self._short(slide_id))

    def _supply(self, slide_id: str) -> Supply:
        """What a slide can still give, as far as the quotas until now have had it looked at, whatever the journal knows beyond."""
        known, record = self.journal.known(slide_id), self.jobs[slide_id].record
        cuts, looked_at = self._seen(slide_id)
        if slide_id in self.failed:  # nothing but what it gave before it failed
            cuts, looked_at = known.cuts, len(known.scan.candidates)
        named = sum(item.label != "unlabelled" for item in known.scan.candidates)
        labelled = sum(item.index < named for item in cuts) + max(named - looked_at, 0)
        total = len(cuts) + len(known.scan.candidates) - looked_at
        limit = self.settings.max_per_slide or total
        labelled, total = min(labelled, limit), min(total, limit)
        return Supply((record.data_provider, record.isup_grade), labelled, total - labelled, len(cuts))

    def _seen(self, slide_id: str) -> tuple[list[Cut], int]:
        """The cuts inside the present quota and the number of candidates that it took to find them."""
        known, quota = self.journal.known(slide_id), self.quotas[slide_id]
        cuts = known.cuts[:quota]
        if len(cuts) < quota:
            return cuts, known.next_index
        return cuts, cuts[-1].index + 1 if cuts else 0

    def _short(self, slide_id: str) -> bool:
        known = self.journal.known(slide_id)
        return len(known.cuts) < self.quotas[slide_id] and known.next_index < len(known.scan.candidates)

    def _rest(self, slide_id: str) -> tuple[list, int, int, list]:
        known = self.journal.known(slide_id)
        return known.scan.candidates, known.next_index, self.quotas[slide_id] - len(known.cuts), known.cuts

    def _add(self, slide_id: str, outcome: Cutting) -> None:
        known = self.journal.known(slide_id)
        kept = [item for item in outcome.cuts if self._path(slide_id, item) not in self.aside]
        rejected = Counter(known.rejected) + Counter(outcome.rejected) + Counter({SET_ASIDE: len(outcome.cuts) - len(kept)})
        self.journal.record_cuts(slide_id, known.cuts + kept, outcome.next_index, dict(rejected))
        if outcome.drawn:
            self.journal.record_overlay(slide_id, _digest(known.cuts))
        self.result.made += len(kept)
        if self.output.due():
            self._write_manifest()

    def _path(self, slide_id: str, item: Cut) -> str:
        return relative_path(slide_id, item.label, item.x, item.y, self.settings.format)

    def _patches(self, whole_journal: bool = False) -> Iterator[Patch]:
        """Rows of the manifest: the cuts inside the quotas, or everything on the disk while the run is under way.

        What was brought back from quarantine keeps its row until its slide was cut anew: a run that is killed must not lose it.
        """
        back = dict(self.back) if whole_journal else {}
        for slide_id, job in self.jobs.items():
            cuts = self.journal.known(slide_id).cuts
            for item in cuts if whole_journal else cuts[: self.quotas[slide_id]]:
                back.pop(path := self._path(slide_id, item), None)
                yield _row(job.record, item, path, self.splits[slide_id])
        yield from back.values()

    def _write_manifest(self) -> None:
        self.output.write_manifest(self._patches(whole_journal=True))

    def _remove_strays(self) -> None:
        """Remove files of ours that no row names: those of a slide that was being cut, and of shares that changed."""
        rows = {patch.path for patch in self._patches(whole_journal=True)}
        stems = {file_stem(slide_id): self.journal.known(slide_id) for slide_id in self.journal.slides}
        remove([file for name, file in self.output.pictures().items() if name not in rows and _is_ours(file.name, stems)])

    def _summarise(self) -> None:
        rejected: Counter = Counter()
        giving = Counter(patch.slide_id for patch in self.result.patches)
        for slide_id in self.jobs:
            known = self.journal.known(slide_id)
            if known.scan:
                rejected.update(known.scan.rejected)
                rejected.update(known.rejected)
                if not giving[slide_id] and slide_id not in self.failed:
                    self.result.empty[slide_id] = _why_empty(known, self.quotas[slide_id])
        self.result.rejected, self.result.slides = dict(rejected), len(giving)


def _sides_written(folder: Path) -> dict[str, str]:
    """Slide -> its side of the split by the manifest, which people may have changed: all patches of a patient on one, say.

    Raises UserError for a slide that it puts on both. One that cannot be read is kept under another name.
    """
    sides, path = {}, folder / manifest.NAME
    try:
        rows = manifest.read_manifest(folder) if path.exists() else []
    except UserError as error:
        kept = path.replace(path.with_name(f"{path.name}.damaged"))
        say(f"warning: {error}; it stays as {kept.name} and is written anew")
        return {}
    for row in rows:
        if sides.setdefault(row.slide_id, row.split) != row.split:
            raise UserError(f"{path} puts slide {row.slide_id} on both sides of the split; give all its rows one side")
    return sides


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _cut_task(task: tuple) -> Cutting | Failure:
    return staging.cut(*task)


def _draw_task(task: tuple) -> Failure | None:
    return staging.draw(*task)


def _fingerprints(job: Job) -> list:
    """Of all that a slide's patches and their labels come from."""
    return fingerprint(job.path) + fingerprint(job.mask_path) + _labelled_by(job)


def _labelled_by(job: Job) -> list[str]:
    """Of the row of train.csv."""
    return [job.record.data_provider, job.record.gleason_score] if job.mask_path else []


def _is_here(job: Job) -> bool:
    """Whether all files of a slide are there: of slides that come and go one may have arrived without its mask."""
    return bool(fingerprint(job.path)) and (job.mask_path is None or bool(fingerprint(job.mask_path)))


def _digest(cuts: list[Cut]) -> str:
    return hashlib.sha256(repr(cuts).encode()).hexdigest()[:16]


_OURS = re.compile(r"\.?(?P<stem>.+)_(?P<x>\d+)_(?P<y>\d+)\.(png|jpg)(\.\d+\.\d+\.tmp)?")


def _is_ours(name: str, stems: dict[str, Known]) -> bool:
    """Whether a file in a label folder was made by this program from a place that the journal knows."""
    match = _OURS.fullmatch(name)
    known = match and stems.get(match["stem"])
    return bool(known and known.was_candidate(int(match["x"]), int(match["y"])))


def _row(record: SlideRecord, item: Cut, path: str, split: str) -> Patch:
    numbers = {"x": item.x, "y": item.y, "level": item.level, "mpp": item.mpp, "tissue": item.tissue, "sharpness": item.sharpness}
    return Patch(path=path, **vars(record), label=item.label, **numbers, split=split)


def _why_empty(known: Known, quota: int) -> str:
    if known.scan.cause:
        return known.scan.cause
    if not quota and known.next_index < len(known.scan.candidates):
        return "no patch was needed from it"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(known.rejected.items()))
    return f"all {len(known.scan.candidates)} places with tissue were rejected ({reasons})"


def _write_failed(path: Path, failures: list[Failure]) -> None:
    write_csv(path, ("slide_id", "stage", "reason"), ((failure.slide_id, failure.stage, failure.reason) for failure in failures))
