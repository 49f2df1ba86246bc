"""Fetch PANDA from Kaggle, all or part; stop it at any time and run it again to go on.

    python download_panda_data.py --num_slides 600              a subset balanced over grade and provider, into datasets/panda
    python download_panda_data.py                               everything (about 400 GB)
    python download_panda_data.py --num_slides 600 --dry_run    how much, how long, does it fit; nothing is written
    python download_panda_data.py --verify                      read every file again and compare checksums
    nohup python download_panda_data.py --num_slides 600 &      progress goes to logs/download.log

Needs a Kaggle account whose owner has accepted the competition's rules: see docs/download.md.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path

from common.cli import natural, positive_int, run, terminate_like_interrupt
from common.errors import UserError
from common.progress import say, track
from data import download, ledger
from data.download import Downloader, Progress, Selection, duration, gigabytes
from data.kaggle import connect
from data.panda import PROVIDERS
from data.subset import read_ids
from data.transfer import Line


def amount(text: str) -> float:
    """Argument type: bytes such as 500MB, 20GB or 1.5TB (decimal units)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 500MB or 20GB")
    return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[found[2].lower()]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--num_slides", type=positive_int, help="slides, balanced over grade and provider (default: all)")
    what.add_argument(
        "--grades", type=int, nargs="+", choices=range(6), metavar="0-5", help="only these ISUP grades (default: all)"
    )
    what.add_argument("--providers", nargs="+", choices=PROVIDERS, help="only these (default: both)")
    what.add_argument("--ids", type=Path, metavar="FILE", help="only the slide ids in this text file, one a line (default: all)")
    what.add_argument("--masks", dest="masks", action="store_true", default=True, help="with label masks (default)")
    what.add_argument("--no_masks", dest="masks", action="store_false", help="without label masks")
    what.add_argument("--include_bad", action="store_true", help="keep slides known to be bad in a subset (default: left out)")
    what.add_argument("--seed", type=natural, default=0, help="another seed, another subset (default: 0)")
    how = parser.add_argument_group("where and how")
    how.add_argument("--data_dir", type=Path, default=Path("datasets/panda"), help="folder to fill (default: datasets/panda)")
    how.add_argument("--workers", type=positive_int, default=4, help="connections at once (default: 4)")
    how.add_argument("--limit_rate", type=amount, metavar="AMOUNT", help="bytes a second at most, such as 5MB (default: no limit)")
    instead = parser.add_argument_group("instead of fetching").add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the chosen files and their sizes in bytes")
    instead.add_argument("--dry_run", action="store_true", help="say how much, how long and whether it fits; write nothing")
    instead.add_argument(
        "--verify", action="store_true", help="check everything that was fetched against its checksum; needs no network"
    )
    return parser.parse_args(arguments)


def selection_of(args: argparse.Namespace) -> Selection:
    ids = tuple(read_ids(args.ids)) if args.ids else None
    grades, providers = (tuple(value) if value else None for value in (args.grades, args.providers))
    return Selection(args.num_slides, grades, providers, ids, args.masks, args.include_bad, args.seed)


def verify(args: argparse.Namespace) -> None:
    known = ledger.Ledger(args.data_dir).entries
    checked = track(ledger.verify(args.data_dir, args.workers), "verify", len(known), "files")
    wrong = {name: problem for name, problem in checked if problem}
    for name, problem in wrong.items():
        say(f"{name}: {problem}")
    if wrong:
        raise UserError(f"{len(wrong)} of {len(known)} files are no longer what arrived; run without --verify to fetch them anew")
    say(f"all {len(known)} files are what arrived")


def announce(plan: download.Plan, missing: dict[str, int], to_come: int, progress: Progress) -> None:
    strata = Counter((record.data_provider, record.isup_grade) for record in plan.slides)
    for provider in sorted({provider for provider, _ in strata}):
        progress.log(f"{provider}: " + ", ".join(f"grade {g}: {strata[provider, g]}" for g in range(6)) + " slides")
    for slide_id, reason in plan.bad.items():
        progress.log(f"left out {slide_id}: {reason} (--include_bad takes it)")
    if plan.absent:
        progress.log(f"{len(plan.absent)} slides of train.csv are not in Kaggle's file list, the first is {plan.absent[0]}")
    total = gigabytes(sum(plan.files.values()))
    progress.log(f"{len(plan.slides)} slides, {len(plan.files)} files, {total}; {len(missing)} files, {gigabytes(to_come)} to come")


def fetch(args: argparse.Namespace, selection: Selection, progress: Progress) -> None:
    line = Line(limit_rate=args.limit_rate, log=progress.log, on_bytes=progress.on_bytes)
    kaggle = connect(line, lambda text: progress.log(f"warning: {text}"))
    with tempfile.TemporaryDirectory() as scratch:
        dry = args.list or args.dry_run
        listing = download.read_listing(kaggle, args.data_dir, fresh=args.list, keep=not dry)
        tables = Downloader(kaggle, line, Path(scratch) if dry else args.data_dir, args.workers)
        plan = download.make_plan(listing, tables.train_csv(listing), selection)
    if args.list:
        for name, size in plan.files.items():
            say(f"{size:>14} {name}")
        return
    downloader = Downloader(kaggle, line, args.data_dir, args.workers)
    missing = downloader.missing(plan.files)
    to_come = downloader.bytes_to_come(missing)
    announce(plan, missing, to_come, progress)
    if not missing:
        progress.log("everything is there; --verify reads it again")
        return
    progress.log(f"way: {downloader.choose_way(len(missing))}")
    speed = downloader.speed(missing)
    free = gigabytes(download.free_disk(args.data_dir))
    progress.log(f"about {duration(to_come / speed)} at the measured {gigabytes(speed)}/s; {free} free on the disk")
    download.check_disk(args.data_dir, to_come, missing)
    if not args.dry_run:
        fetch_missing(downloader, missing, to_come, progress)


def fetch_missing(downloader: Downloader, missing: dict[str, int], to_come: int, progress: Progress) -> None:
    progress.start(to_come, len(missing))
    failed = 0
    for _, outcome in downloader.fetch_all(missing):
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


def main() -> None:
    args = parse()
    terminate_like_interrupt()
    selection = selection_of(args)
    if args.verify:
        return verify(args)
    only_look = args.list or args.dry_run
    progress = Progress(None if only_look else Path("logs/download.log"))
    try:
        if only_look:
            return fetch(args, selection, progress)
        args.data_dir.mkdir(parents=True, exist_ok=True)
        with download.locked(args.data_dir, progress.log):
            return fetch(args, selection, progress)
    finally:
        progress.close()


if __name__ == "__main__":
    run(main)
