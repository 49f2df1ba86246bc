"""Fetch PANDA from Kaggle, all or part; stop it at any time and run it again to go on.

    python download_panda_data.py --num_slides 600              # a subset balanced over grade and provider, into datasets/panda
    python download_panda_data.py                               # everything (about 400 GB)
    python download_panda_data.py --num_slides 600 --dry_run    # how much, how long, does it fit; nothing is written
    python download_panda_data.py --verify                      # read every file again and compare checksums
    python download_panda_data.py --stream --max_disk 20GB      # patches of all slides into datasets/patches, keeping no slide
    nohup python download_panda_data.py --num_slides 600 &      # progress goes to logs/download.log

Needs a Kaggle account whose owner has accepted the competition's rules: see docs/download.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import cli
from common.errors import UserError
from common.progress import say, track
from data import download, ledger
from data.download import Downloader, Plan, Selection
from data.kaggle import connect
from data.panda import PROVIDERS, read_train_csv
from data.reporting import Progress, amount, gigabytes
from data.subset import read_ids
from data.transfer import Line

STREAM_FLAGS = ("max_disk", "output_dir", "max_patches", "max_per_slide", "patch_size", "level", "mpp", "min_tissue", "format")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = parser.add_argument_group("what")
    what.add_argument(
        "--num_slides", type=cli.positive_int, help="how many slides, balanced over grade and provider (default: all)"
    )
    what.add_argument(
        "--grades", type=int, nargs="+", choices=range(6), metavar="0-5", help="only these ISUP grades (default: all)"
    )
    what.add_argument("--providers", nargs="+", choices=PROVIDERS, help="only slides of these hospitals (default: both)")
    what.add_argument("--ids", type=Path, metavar="FILE", help="only the slide ids in this text file, one a line (default: all)")
    what.add_argument("--masks", dest="masks", action="store_true", default=True, help="with label masks (default)")
    what.add_argument("--no_masks", dest="masks", action="store_false", help="without label masks")
    what.add_argument("--include_bad", action="store_true", help="keep slides known to be bad in a subset (default: left out)")
    what.add_argument("--seed", type=cli.natural, default=0, help="another seed, another subset (default: 0)")
    how = parser.add_argument_group("where and how")
    how.add_argument("--data_dir", type=Path, default=Path("datasets/panda"), help="folder to fill (default: datasets/panda)")
    how.add_argument("--workers", type=cli.positive_int, default=4, help="connections at once (default: 4)")
    how.add_argument("--limit_rate", type=amount, metavar="AMOUNT", help="bytes a second at most, such as 5MB (default: no limit)")
    instead = parser.add_argument_group("instead of fetching").add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the chosen files and their sizes in bytes")
    instead.add_argument("--dry_run", action="store_true", help="say how much, how long and whether it fits; write nothing")
    instead.add_argument("--verify", action="store_true", help="check what was fetched against its checksums; needs no network")
    add_stream_flags(parser)
    args = parser.parse_args(arguments)
    given = [name for name in STREAM_FLAGS if getattr(args, name) is not None]
    if given and not args.stream:
        parser.error(f"--{given[0]} needs --stream")
    if args.stream and (args.list or args.verify):
        parser.error("--stream goes with neither --list nor --verify")
    if args.stream and args.include_bad:
        parser.error("--stream keeps patches only, and none are taken from slides known to be bad: leave --include_bad out")
    return args


def add_stream_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("patches without keeping slides; the defaults are those of extract_patches.py")
    flags.add_argument(
        "--stream", action="store_true", help="fetch, take patches, delete the slide, and so on (default: keep slides)"
    )
    flags.add_argument(
        "--max_disk", type=amount, metavar="AMOUNT", help="bytes of slides on the disk at any moment (default: 20GB)"
    )
    flags.add_argument("--output_dir", type=Path, help="patches go here (default: datasets/patches)")
    flags.add_argument("--max_patches", type=cli.positive_int, help="patches altogether (default: 10000)")
    flags.add_argument("--max_per_slide", type=cli.positive_int, help="patches from one slide at most (default: no limit)")
    flags.add_argument("--patch_size", type=cli.patch_side, help="side of a patch in pixels (default: 256)")
    scale = flags.add_mutually_exclusive_group()
    scale.add_argument("--level", type=cli.natural, help="pyramid level to read, 0 is full resolution (default: 0)")
    scale.add_argument("--mpp", type=cli.positive_float, help="micrometres per pixel to resample to (default: the level's own)")
    flags.add_argument("--min_tissue", type=cli.fraction, help="least share of tissue, 0 to 1 (default: 0.5)")
    flags.add_argument("--format", choices=("png", "jpg"), help="file format of the patches (default: png)")


def verify(args: argparse.Namespace) -> None:
    known = ledger.Ledger(args.data_dir).entries
    checked = track(ledger.verify(args.data_dir, args.workers), "verify", len(known), "files")
    wrong = {name: problem for name, problem in checked if problem}
    table = args.data_dir / ledger.TABLE
    corrected = table.is_file() and wrong.pop(ledger.TABLE, None) is not None
    if corrected:
        say(f"note: {table} {download.CHANGED}")
    for name, problem in wrong.items():
        say(f"{name}: {problem}")
    if wrong:
        raise UserError(f"{len(wrong)} of {len(known)} files are no longer what arrived; run without --verify to fetch them anew")
    say(f"all {len(known) - 1} other files are what arrived" if corrected else f"all {len(known)} files are what arrived")


def run(args: argparse.Namespace, selection: Selection, progress: Progress) -> int | None:
    line = Line(limit_rate=args.limit_rate, log=progress.log, on_bytes=progress.on_bytes)
    kaggle = connect(line, lambda text: progress.log(f"warning: {text}"))
    with tempfile.TemporaryDirectory() as scratch:
        dry = args.list or args.dry_run
        keep = args.data_dir.is_dir() if args.list else not dry
        listing = download.read_listing(kaggle, args.data_dir, fresh=args.list, keep=keep)
        tables = Downloader(kaggle, line, Path(scratch) if dry else args.data_dir, args.workers)
        table = args.data_dir / ledger.TABLE
        records = read_train_csv(table) if dry and table.is_file() else tables.train_csv(listing)
        plan = download.make_plan(listing, records, selection)
    if plan.absent:
        download.forget_listing(args.data_dir)
    if args.list:
        for name, size in plan.files.items():
            say(f"{size:>14} {name}")
        return None
    download.announce(plan, selection.num_slides, progress.log)
    if args.stream:
        from data import stream  # only here: it needs what the extraction needs

        return stream.main(kaggle, line, plan, args, progress)
    return fetch(Downloader(kaggle, line, args.data_dir, args.workers), plan, args, progress)


def fetch(downloader: Downloader, plan: Plan, args: argparse.Namespace, progress: Progress) -> None:
    missing = downloader.missing(plan.files)
    if not missing:
        progress.log("everything is there; --verify reads it again")
        return
    to_come, free = downloader.bytes_to_come(missing), download.free_disk(args.data_dir)
    progress.log(f"{len(missing)} files, {gigabytes(to_come)} to come; {gigabytes(free)} free on the disk")
    progress.log(f"way: {downloader.choose_way(len(missing))}")
    progress.log(downloader.measured(missing, to_come))
    download.check_disk(args.data_dir, to_come, missing, len(plan.slides))
    if not args.dry_run:
        download.fetch_missing(downloader, missing, progress)


def main() -> int | None:
    args = parse()
    cli.terminate_like_interrupt()
    if args.verify:
        return verify(args)
    ids = tuple(read_ids(args.ids)) if args.ids else None
    grades, providers = (tuple(value) if value else None for value in (args.grades, args.providers))
    selection = Selection(args.num_slides, grades, providers, ids, args.masks, args.include_bad, args.seed, args.stream)
    only_look = args.list or args.dry_run
    progress = Progress(None if only_look else Path("logs/download.log"))
    try:
        if only_look:
            return run(args, selection, progress)
        args.data_dir.mkdir(parents=True, exist_ok=True)
        with download.locked(args.data_dir, progress.log):
            return run(args, selection, progress)
    finally:
        progress.close()


if __name__ == "__main__":
    cli.run(main)
