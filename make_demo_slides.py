"""Draw demo slides in PANDA's layout, so that the whole toolkit can be tried without downloading anything.

    python make_demo_slides.py                                    # 12 slides of 4096 x 4096 pixels in datasets/demo
    python make_demo_slides.py --num_slides 40 --seed 1 --out datasets/more_demo
    python extract_patches.py --data_dir datasets/demo --output_dir datasets/demo_patches

Writes train.csv, train_images/ and train_label_masks/. The same seed gives the same bytes. A stopped run continues; slides that
are there already are kept. The tissue is a drawing: good for learning and testing the tools, never for a scientific claim.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import cli
from common.progress import say
from data.demo import SHRINK, SMALLEST, write_demo_slides


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text above as it stands, and each flag's default."""


def parse() -> argparse.Namespace:
    """Read and check the command line."""
    parser = cli.Parser(__doc__, Help)
    slides = parser.add_argument_group("slides")
    slides.add_argument("--num_slides", type=cli.positive_int, default=12, help="how many slides; 12 hold every grade and provider")
    slides.add_argument("--slide_size", type=cli.positive_int, default=4096, help="side of a slide in pixels at level 0")
    slides.add_argument("--seed", type=cli.natural, default=0, help="what to draw: the same seed gives the same bytes")
    running = parser.add_argument_group("running")
    running.add_argument("--out", type=Path, default=Path("datasets/demo"), help="folder for the slides")
    running.add_argument("--workers", type=cli.positive_int, default=2, help="processes that draw at the same time")
    args = parser.parse_args()
    if args.slide_size < SMALLEST or args.slide_size % SHRINK[-1]:
        parser.error(f"--slide_size {args.slide_size} is not a multiple of {SHRINK[-1]} of at least {SMALLEST}")
    return args


def main() -> int:
    """Draw the slides and say what there is."""
    args = parse()
    cli.terminate_like_interrupt()
    records = write_demo_slides(args.out, args.num_slides, args.slide_size, args.seed, args.workers)
    grades = ", ".join(f"{sum(record.isup_grade == grade for record in records)} of grade {grade}" for grade in range(6))
    say(f"{len(records)} slides in {args.out} by ISUP grade: {grades}")
    return 0


if __name__ == "__main__":
    cli.run(main)
