"""Slides -> labelled patches and their manifest.

    python extract_patches.py --max_patches 10000
    python extract_patches.py --shards datasets/shards              # and pack them into tar files
    python extract_patches.py --data_dir my_slides --output_dir my_patches --mpp 0.5 --patch_size 256
    python extract_patches.py --data_dir s3://BUCKET/panda --output_dir s3://BUCKET/patches --shards s3://BUCKET/shards

Reads PANDA's layout (train.csv, train_images/, train_label_masks/) or any folder of slides that OpenSlide can read. Writes
OUTPUT_DIR/LABEL/SLIDE_X_Y.png, OUTPUT_DIR/patches.csv, failed_slides.csv beside it, and one picture per slide with the
chosen patches under overlays/ next to OUTPUT_DIR. Stopped or killed, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from collections import Counter

from common import cli
from common.progress import say
from common.storage import Place, place
from data.panda import LABELS
from data.patches import FORMATS, ExtractResult, ExtractSettings, extract, overlay_folder
from data.shards import check_target, pack
from data.staging import FAILED_NAME
from data.workers import cores

DEFAULTS = ExtractSettings()
MAX_SHOWN = 10


def parse_arguments(arguments: list[str] | None = None) -> tuple[ExtractSettings, Place | None]:
    """What to extract, and where to put shards of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = parser.add_argument_group("folders (paths, or URLs such as s3://BUCKET/FOLDER: docs/scaling.md)")
    folders.add_argument("--data_dir", type=place, default=DEFAULTS.data_dir, help="slides (default: %(default)s)")
    folders.add_argument("--output_dir", type=place, default=DEFAULTS.output_dir, help="patches go here (default: %(default)s)")
    folders.add_argument("--shards", type=place, metavar="DIR", help="also pack the patches into tar shards here, docs/scaling.md")
    patch = parser.add_argument_group("one patch")
    patch.add_argument("--patch_size", type=cli.positive_int, default=256, help="side of a patch in pixels (default: %(default)s)")
    scale = patch.add_mutually_exclusive_group()
    scale.add_argument(
        "--level", type=cli.natural, default=0, help="pyramid level to read, 0 is full resolution (default: %(default)s)"
    )
    scale.add_argument(
        "--mpp",
        type=cli.positive_float,
        help="micrometres per pixel to resample to, whatever the scanner (default: the level's own)",
    )
    patch.add_argument("--min_tissue", type=cli.fraction, default=0.5, help="least share of tissue, 0 to 1 (default: %(default)s)")
    patch.add_argument(
        "--format", choices=FORMATS, default="png", help="png keeps every pixel, jpg (quality 95) is smaller (default: %(default)s)"
    )
    amount = parser.add_argument_group("how many")
    amount.add_argument(
        "--max_patches",
        type=cli.positive_int,
        default=10_000,
        help="patches altogether, balanced over grade and provider (default: %(default)s)",
    )
    amount.add_argument("--max_per_slide", type=cli.positive_int, help="patches from one slide at most (default: no limit)")
    amount.add_argument("--seed", type=int, default=0, help="decides among equal patches (default: %(default)s)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--workers",
        type=cli.natural,
        default=cores(),
        help="processes; 0 for none, to debug (default: all cores, here %(default)s)",
    )
    machine.add_argument(
        "--scheduler", metavar="tcp://HOST:8786", help="cut on the workers of this Dask cluster instead (docs/scaling.md)"
    )
    options = parser.parse_args(arguments)
    if not 16 <= options.patch_size <= 4096:
        parser.error("--patch_size must lie between 16 and 4096 pixels")
    shards = vars(options).pop("shards")
    return ExtractSettings(**vars(options)), shards


def report(settings: ExtractSettings, result: ExtractResult) -> int:
    """Print what came of it; the exit code."""
    for reason, count in result.left_out.items():
        say(f"left out: {count} slide(s) {reason}")
    _report_empty(result.empty)
    _report_table(result)
    if result.rejected:
        say("rejected places: " + ", ".join(f"{count} {reason}" for reason, count in sorted(result.rejected.items())))
    missing = settings.max_patches - len(result.patches)
    if missing > 0:
        say(f"{missing} short of --max_patches {settings.max_patches}: no more usable tissue; add slides or lower --min_tissue")
    rate = f" ({result.made / result.seconds:.0f} patches/s)" if result.made else ""
    say(f"{len(result.patches)} patches from {result.slides} slides in {settings.output_dir}")
    say(f"{result.made} made now in {result.seconds:.1f} s{rate}; pictures in {overlay_folder(settings.output_dir)}")
    say(f"next: python check_data.py --patches {settings.output_dir}")
    if result.failed:
        failed = settings.output_dir / FAILED_NAME
        say(f"error: {len(result.failed)} slide(s) could not be read, see {failed}; mend them and start again")
    elif not result.patches:
        say("error: no patch at all; the warnings above say why")
    return int(bool(result.failed) or not result.patches)


def _report_empty(empty: dict[str, str]) -> None:
    wanted = {slide_id: cause for slide_id, cause in empty.items() if cause != "no patch was needed from it"}
    for slide_id, cause in list(wanted.items())[:MAX_SHOWN]:
        say(f"warning: slide {slide_id} gives no patch: {cause}")
    if len(wanted) > MAX_SHOWN:
        say(f"warning: {len(wanted) - MAX_SHOWN} more slides give no patch")


def _report_table(result: ExtractResult) -> None:
    providers = sorted({patch.data_provider for patch in result.patches})
    columns = [
        *((provider or "unknown", "data_provider", provider) for provider in providers),
        ("train", "split", "train"),
        ("test", "split", "test"),
    ]
    say("".join(f"{name:>12}" for name in ("label", *(name for name, _, _ in columns), "all")))
    for label in LABELS:
        rows = [patch for patch in result.patches if patch.label == label]
        counts = [Counter(getattr(patch, field) for patch in rows)[value] for _, field, value in columns]
        say("".join(f"{value:>12}" for value in (label, *counts, len(rows))))


def main() -> int:
    settings, shards = parse_arguments()
    cli.terminate_like_interrupt()
    if shards:
        check_target(settings.output_dir, shards)
    result = extract(settings)
    if shards and result.patches:
        say(f"{pack(settings.output_dir, shards)} patches in shards in {shards}; train.py --patches {shards} reads them")
    return report(settings, result)


if __name__ == "__main__":
    cli.run(main)
