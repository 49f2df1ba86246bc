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

from common import cli
from common.progress import say
from common.storage import Place, place
from data.extract_report import report
from data.patches import FORMATS, ExtractSettings, extract, overlay_folder
from data.shards import check_target, pack
from data.workers import cores

DEFAULTS = ExtractSettings()


def parse_arguments(arguments: list[str] | None = None) -> tuple[ExtractSettings, Place | None]:
    """What to extract, and where to put shards of it."""
    parser = cli.Parser(__doc__)
    folders = parser.add_argument_group("folders (paths, or URLs such as s3://BUCKET/FOLDER: docs/scaling.md)")
    folders.add_argument("--data_dir", type=place, default=DEFAULTS.data_dir, help="slides (default: %(default)s)")
    folders.add_argument("--output_dir", type=place, default=DEFAULTS.output_dir, help="patches go here (default: %(default)s)")
    folders.add_argument(
        "--shards",
        type=place,
        metavar="DIR",
        help="also pack the patches into tar shards here: docs/scaling.md (default: no shards)",
    )
    patch = parser.add_argument_group("one patch")
    patch.add_argument("--patch_size", type=cli.patch_side, default=256, help="side of a patch in pixels (default: %(default)s)")
    scale = patch.add_mutually_exclusive_group()
    scale.add_argument("--level", type=cli.natural, help="pyramid level to read, 0 is full resolution (default: 0)")
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
    amount.add_argument("--seed", type=cli.natural, default=0, help="decides among equal patches (default: %(default)s)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--workers",
        type=cli.natural,
        default=cores(),
        help="processes; 0 for none, to debug (default: all cores, here %(default)s)",
    )
    machine.add_argument(
        "--scheduler",
        type=cli.network_address,
        metavar="tcp://HOST:8786",
        help="cut on the workers of this Dask cluster: docs/scaling.md (default: on this machine)",
    )
    options = parser.parse_args(arguments)
    shards = vars(options).pop("shards")
    options.level = options.level or 0  # without a default, so that --level 0 beside --mpp is seen
    return ExtractSettings(**vars(options)), shards


def main() -> int:
    settings, shards = parse_arguments()
    cli.terminate_like_interrupt()
    if shards:
        check_target(settings.output_dir, shards)
    result = extract(settings)
    if shards and result.patches:
        say(f"{pack(settings.output_dir, shards)} patches in shards in {shards}; train.py --patches {shards} reads them")
    say(f"every slide with the chosen places: {overlay_folder(settings.output_dir)}")
    return report(settings, result)


if __name__ == "__main__":
    cli.run(main)
