"""Measure how good generated patches are: distance from real tissue, variety, copies, artefacts, grade fidelity, usefulness.

    python evaluate.py --checkpoint checkpoints/G_final.pt --patches datasets/patches
    python evaluate.py --images synthetic --patches datasets/patches --out evaluation
    python evaluate.py --images synthetic --patches real_images --skip utility --max_images 500
    python evaluate.py --compare logs/RUN_A logs/RUN_B          # two training runs side by side, in OUT/compare.html

Writes OUT/report.html for people and OUT/metrics.json for programs.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import cli
from common.errors import UserError
from common.labels import PROVIDERS, known, provider_in
from common.progress import say
from common.storage import place
from common.weights import INSTALL
from data.copies import at_hand
from data.dataset import PatchFile, class_of, condition_of, content_of, list_patches, reader
from data.holdout import groups_of, train_and_held_out, what_flatters
from metrics.copies import Gallery
from metrics.evaluation import PARTS, Networks, Sets, assess
from metrics.features import inception, lite0
from metrics.images import ImageSet, choose, draw_set, mixed_otherwise, read_images, reduced, side_of
from metrics.pixel_search import SIDE
from metrics.report import headline, write_report
from models.features import LITE0_WEIGHTS, Lite0
from training import processes
from training.compare import compare_runs
from training.device import choose_device
from training.sampling import Sampler, load_sampler

FEWEST_PIXELS = 8  # a side
WAY_OUT = "run generate.py or name the generated images' folder with --images"


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = parser.add_argument_group("what to evaluate")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="checkpoint of train.py; its averaged generator draws images"
    )
    source.add_argument("--images", type=Path, metavar="FOLDER", help="folder of images of any program; LABEL sub-folders are used")
    source.add_argument(
        "--compare", type=Path, nargs=2, metavar=("RUN_A", "RUN_B"), help="two log folders of train.py: which to train on, and why"
    )
    what.add_argument(
        "--patches", type=place, default=Path("datasets/patches"), help="real patches, folder or URL (default: %(default)s)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--max_images", type=cli.positive_int, default=2048, help="most images of each set (default: %(default)s)")
    how.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="parts to leave out (default: none)")
    how.add_argument("--seed", type=cli.natural, default=0, help="decides every draw (default: %(default)s)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    how.add_argument("--weights", type=Path, metavar="FILE", help="InceptionV3 of FID (default: the installed package)")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder of report.html and metrics.json (default: %(default)s)"
    )
    files.add_argument(
        "--cache",
        type=Path,
        default=Path("datasets/.features"),
        help="folder that keeps features of real patches (default: %(default)s)",
    )
    return parser.parse_args()


def read_set(
    folder: Path, files: list[PatchFile], groups: list[str], size: int, condition: str, what: str, hospitals: set[str]
) -> ImageSet:
    """Decoded images with what is known about each. groups: their slides. hospitals: that labels may end with."""
    images = read_images([folder / file.path for file in files], reader(folder), size, f"read {what}")
    names = [class_of(file, condition) for file in files]
    providers = [file.data_provider or provider_in(name, hospitals) for file, name in zip(files, names, strict=True)]
    columns = ([file.path for file in files], [known(name) for name in names], providers, groups)
    return ImageSet(images, *map(np.array, columns))


def smallest_side(folder: Path, files: list[PatchFile]) -> int:
    """Of all the images, by their headers, in pixels. Raises UserError for one that would take the detail from all the others."""
    sides = np.array([side_of(content_of(folder, file.path), folder / file.path) for file in files])
    least, usual = int(sides.min()), float(np.median(sides))
    if least < usual / 2:
        path = folder / files[int(sides.argmin())].path
        size = f"{least} pixels wide or high, and most images have {usual:g}"
        raise UserError(f"{path} is {size}: all are compared at the smallest size, so remove it")
    return least


def too_small(images: ImageSet) -> list[str]:
    """A sentence where images are too small to tell much."""
    side = images.images.shape[1]
    return [f"Images of {side} pixels hold too little to find copies and most faults by."] if side < SIDE else []


def of_one_stain(made: Sampler | list[PatchFile]) -> list[str]:
    """A sentence where the patches that a model learned from are not the ones that its images are compared with."""
    if not isinstance(made, Sampler) or made.stain_normalize == "none":
        return []
    return [
        f"The model learned from patches brought to one stain (--stain_normalize {made.stain_normalize}) and is compared with "
        "patches as they are: distances, colours and stain variety count that as a fault."
    ]


def some_of(files: list[PatchFile], args: argparse.Namespace) -> list[PatchFile]:
    """At most --max_images, drawn."""
    return [files[index] for index in choose(len(files), args.max_images, args.seed)]


def load_sets(args: argparse.Namespace, real: tuple[list[PatchFile], ...], made: Sampler | list[PatchFile]) -> Sets:
    """Everything at the size of the smallest image; the generated ones drawn or read."""
    train, held_out = real
    drawn = isinstance(made, Sampler)
    condition = (made.condition if made.labels else "label") if drawn else condition_of({file.label for file in made})
    hospitals = {*PROVIDERS, *(file.data_provider for file in train)} - {""} if "provider" in condition else set()
    every, some, chosen = some_of(train, args), some_of(held_out, args), [] if drawn else some_of(made, args)
    made_at = made.image_size if drawn else smallest_side(args.images, chosen)
    size = min(made_at, smallest_side(args.patches, every + some))
    if size < FEWEST_PIXELS:
        raise UserError(f"images of {size} pixels show nothing that could be compared; they need {FEWEST_PIXELS} a side at least")
    read, names = reader(args.patches), np.array([file.path for file in train])
    gallery = read_images([args.patches / name for name in names], read, SIDE, "read all training patches, small")
    if drawn:
        classes = [class_of(file, condition) for file in train]
        fake = draw_set(made.sample, made.labels, classes, args.max_images, args.seed, hospitals)
        fake = replace(fake, images=reduced(fake.images, size))
    else:
        fake = read_set(args.images, chosen, groups_of(args.images, chosen), size, "label", "generated images", hospitals)
    return Sets(
        read_set(args.patches, every, [file.slide_id for file in every], size, condition, "training patches", hospitals),
        read_set(args.patches, some, [file.slide_id for file in some], size, condition, "held-out patches", hospitals),
        fake,
        Gallery(gallery, names, lambda index: read(args.patches / names[index], size)),
    )


def main() -> int:
    args = parse_arguments()
    if args.compare:
        return compare_runs(*args.compare, args.out)
    for folder in (args.out, args.cache):
        folder.mkdir(parents=True, exist_ok=True)  # a name that cannot be one is told before the work
    with tempfile.TemporaryFile(dir=args.out):  # and so is a folder that cannot be written
        pass
    args.patches = at_hand(args.patches)
    together, device = processes.join(choose_device(args.device))
    train, held_out = real = train_and_held_out(args.patches)
    made = load_sampler(args.checkpoint, device) if args.checkpoint else list_patches(args.images, WAY_OUT)
    networks, notes = Networks(inception(args.weights, device)), what_flatters(train, held_out) + of_one_stain(made)
    if LITE0_WEIGHTS.installed():
        network = Lite0().to(device, memory_format=torch.channels_last)
        networks = Networks(networks.standard, *lite0(network, LITE0_WEIGHTS.digest, device))
    else:
        notes.append(f"No second feature space, and no search for copies in other than quarter turns: run {INSTALL}")
    notes += [f"Left out, as asked: {', '.join(args.skip)}."] if args.skip else []
    sets = load_sets(args, real, made)
    notes += mixed_otherwise(sets.fake, sets.train) + too_small(sets.fake)
    cache = args.cache if together.world == 1 else None  # in which some might find what others do not, and leave them waiting
    sections = assess(sets, networks.shared(together.run, together.world), args.seed, args.skip, cache)
    processes.leave(together)
    if not together.first:
        return 0
    settings = {
        "generated": args.checkpoint or args.images,
        "real": args.patches,
        "compared at": "{0} x {0} pixels".format(sets.fake.images.shape[1]),
        "number generated": len(sets.fake),
        "number of training patches": f"{len(sets.train)} of {len(train)} (for copies: all)",
        "number of held-out patches": len(sets.held_out),
        "resize filter": "area averaging where images are larger; 299 x 299 for Inception by TensorFlow 1's bilinear filter",
        "seed": args.seed,
        "weights": ", ".join(f"{e.name}: {e.weights}" for e in vars(networks).values() if e),
    }
    write_report(args.out, "How good are these images?", {name: str(value) for name, value in settings.items()}, notes, sections)
    say("\n".join(headline(notes, sections)))
    say(f"report: {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
