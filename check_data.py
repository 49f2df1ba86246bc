"""Check slides, masks and patches before a week of training rests on them.

    python check_data.py                                   # every slide and patch folder below datasets/
    python check_data.py --patches datasets/patches        # one folder of patches
    python check_data.py --slides datasets/panda           # one folder of slides in PANDA's layout
    python check_data.py --quarantine                      # move bad patches to DIR_quarantine/ and mend the manifest

Prints what was found, writes logs/check_data/report.html and report.json. Exit 0: usable; 1: something is broken.
Nothing is ever deleted: DIR_quarantine/reasons.csv says why each patch was moved and keeps its manifest row.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common.cli import Parser, existing_folder, natural, run, terminate_like_interrupt
from common.errors import UserError
from common.progress import say
from common.storage import Place, place
from data.copies import at_hand
from data.findings import Assessment
from data.quality import find_folders
from data.quality_patches import assess, scan_patch_folder
from data.quality_report import text_lines, verdict, write_report
from data.quality_slides import check_slide_folder
from data.quarantine import finish, is_pending, quarantine_folder, set_aside
from data.shards import is_sharded
from data.workers import cores

DATASETS = Path("datasets")
WAY_OUT = "run make_demo_slides.py or download_panda_data.py, then extract_patches.py, or name a folder with --slides or --patches"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    data = parser.add_argument_group("data (default: every slide and patch folder below datasets/)")
    data.add_argument("--slides", type=Path, action="append", default=[], metavar="DIR", help="folder of slides; may be repeated")
    data.add_argument(
        "--patches", type=place, action="append", default=[], metavar="DIR", help="folder of patches, or its URL; may be repeated"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("logs/check_data"), help="folder of the report (default: %(default)s)")
    output.add_argument(
        "--quarantine",
        action="store_true",
        help="move patches that are damaged, blank, repeated, grey, or of another size than most to DIR_quarantine/ and mend the "
        "manifest (default: off)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--workers", type=natural, default=cores(), help="processes; 0 for none, to debug (default: all cores, here %(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    terminate_like_interrupt()
    start = time.monotonic()
    slides, patches = folders_to_check(args)
    assessments = [check_slide_folder(folder, args.workers) for folder in slides]
    assessments += [check_patches(at_hand(folder), args.workers, args.quarantine) for folder in patches]
    for assessment in assessments:
        print("\n".join(text_lines(assessment)), end="\n\n")
    made = f"Made by check_data.py on {time.strftime('%Y-%m-%d %H:%M')} in {time.monotonic() - start:.0f} s"
    write_report(args.out, assessments, made)
    broken = any(assessment.broken for assessment in assessments)
    print(f"{verdict(assessments)}; report: {args.out / 'report.html'}")
    return 1 if broken else 0


def folders_to_check(args: argparse.Namespace) -> tuple[list[Path], list[Place]]:
    """The slide and patch folders that were named, or else those below datasets/."""
    for folder in (*args.slides, *args.patches):
        if isinstance(folder, Path):
            existing_folder(folder, "data", "name another folder")
        elif args.quarantine:
            raise UserError(f"--quarantine moves files of this machine and not those in {folder}; copy the folder here for it")
    if args.slides or args.patches:
        return args.slides, args.patches
    slides, patches = find_folders(DATASETS)
    if not slides and not patches:
        raise UserError(f"no slides and no patches below {DATASETS}/; {WAY_OUT}")
    return slides, patches


def check_patches(folder: Path, workers: int, quarantine: bool) -> Assessment:
    """Check one patch folder; with ``quarantine`` set its bad patches aside and judge what is left."""
    if quarantine and is_sharded(folder):
        raise UserError(f"{folder} holds shards, which are not changed: check the patches they were made of and pack them again")
    if quarantine and (count := finish(folder)):  # asked first: while an extraction runs it refuses, before the long look
        say(f"{folder}: finished an interrupted quarantine of {count} patches")
    elif is_pending(folder):
        say(f"{folder}: a quarantine was interrupted; run again with --quarantine to finish it")
    listing, scans = scan_patch_folder(folder, workers)
    assessment = assess(folder, listing, scans)
    if quarantine and (count := set_aside(folder, assessment.faults)):
        say(f"{folder}: {count} patches or manifest rows set aside, see {quarantine_folder(folder) / 'reasons.csv'}")
        gone = assessment.faults.keys()
        assessment = assess(folder, listing.without(gone), {path: scan for path, scan in scans.items() if path not in gone})
    return assessment


if __name__ == "__main__":
    run(main)
