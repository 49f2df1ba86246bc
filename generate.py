"""Turn a checkpoint into images, ready for augmenting a classifier.

python generate.py --checkpoint checkpoints/G_final.pt --num 500 --label gleason4 --out synthetic/
python generate.py --checkpoint checkpoints/G_final.pt --num 2000 --out synthetic/            # every label in turn
python generate.py --checkpoint checkpoints/G_final.pt --num 500 --best_of 4         # the clearest of four for each
python generate.py --checkpoint checkpoints/G_final.pt --grid samples.png
python generate.py --checkpoint checkpoints/G_final.pt --interpolate walk.mp4 --label benign
torchrun --nproc_per_node 8 -- generate.py --num 100000 --out synthetic/        # the same images by eight processes
"""

import argparse
from pathlib import Path

import torch

from common import cli
from common.errors import UserError
from common.files import sha256
from common.labels import known
from common.progress import say
from common.storage import Place, place
from data.copies import at_hand
from data.dataset import class_of, list_patches, reader
from metrics.features import backbone
from metrics.images import ImageSet, choose, image_set, read_images
from metrics.selection import LabelJudge, best_of, digest
from models.features import LITE0_WEIGHTS, Lite0
from training import processes
from training.device import choose_device
from training.processes import Processes
from training.sampling import Sampler, load_sampler
from training.synthetic import Origin, draw_film, draw_grid, write_images

MOST_PATCHES = 2048  # that the judge of --best_of learns from


def main() -> int:
    args = parse()
    cli.terminate_like_interrupt()
    together, device = processes.join(choose_device(args.device))
    sampler = load_sampler(args.checkpoint, device, args.guidance, args.truncation)
    if args.grid and together.first:
        draw_grid(sampler, [label for label in labels_of(sampler, args.label) if label], args.seed, args.grid)
    if args.interpolate and together.first:
        draw_film(sampler, labels_of(sampler, args.label)[0], args.seed, args.interpolate)
    if args.num:
        write(sampler, args, together)
    processes.leave(together)
    return 0


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = parser.add_argument_group("what")
    what.add_argument("--checkpoint", type=Path, default=Path("checkpoints/G_final.pt"), metavar="FILE", help="default %(default)s")
    what.add_argument("--num", type=cli.positive_int, help="images to write, shared evenly among the labels without --label")
    what.add_argument("--label", help="one class of the model, such as gleason4 or isup3; default each in turn, but not unlabelled")
    what.add_argument("--grid", type=cli.picture_file, metavar="FILE", help="write one picture with a row for each label")
    what.add_argument(
        "--interpolate",
        type=cli.film_file,
        metavar="FILE",
        help="write a film of images that change into each other, as .gif or .mp4",
    )
    what.add_argument("--seed", type=cli.natural, default=0, help="image k follows from seed, label, k; default %(default)s")
    what.add_argument("--truncation", type=cli.fraction, default=1.0, help="0..1, below 1 less varied; default %(default)s")
    what.add_argument(
        "--guidance",
        type=cli.non_negative_float,
        default=0.0,
        metavar="G",
        help="move the improved model's labels apart by this share of their distance from their mean, such as 0.25: clearer, "
        "less true to each; default %(default)s",
    )
    what.add_argument(
        "--best_of",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="draw N images for each of --num and keep the one that shows its label most clearly to a classifier of the training "
        "patches; default %(default)s",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--patches",
        type=place,
        default=Path("datasets/patches"),
        metavar="DIR",
        help="what the classifier of --best_of learns from, folder or URL; default %(default)s",
    )
    where.add_argument(
        "--out",
        type=Path,
        default=Path("synthetic"),
        metavar="DIR",
        help="OUT/LABEL/*.png and OUT/manifest.csv; default %(default)s",
    )
    where.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default %(default)s")
    args = parser.parse_args()
    if not (args.num or args.grid or args.interpolate):
        parser.error("say what to make: --num N images, --grid FILE or --interpolate FILE")
    if args.best_of > 1 and not args.num:
        parser.error("--best_of chooses among the images of --num; give a number")
    return args


def labels_of(sampler: Sampler, label: str | None) -> list[str]:
    """Labels to draw: the one asked for, else all that say something; [""] for an unconditional model."""
    if label is not None:
        sampler.number(label)  # an unknown label is an error that lists the known ones
        return [label]
    return [name for name in sampler.labels if known(name)] or sampler.labels or [""]


def write(sampler: Sampler, args: argparse.Namespace, together: Processes) -> None:
    """--num images into --out, shared evenly among the labels."""
    labels = labels_of(sampler, args.label)
    shares = {label: args.num // len(labels) + (rank < args.num % len(labels)) for rank, label in enumerate(labels)}
    shares = {label: count for label, count in shares.items() if count}  # an ImageFolder has no empty classes
    judging = judging_patches(sampler, args.patches) if args.best_of > 1 else None
    made = args.seed, sampler.truncation, args.checkpoint.as_posix(), sha256(args.checkpoint), args.best_of, sampler.guidance
    origin = Origin(*made, digest(judging) if judging else "")

    def prepare():
        return best_of(sampler.sample, label_judge(sampler, judging, labels), args.best_of) if judging else sampler.sample

    write_images(prepare, shares, args.out, origin, together)


def judging_patches(sampler: Sampler, folder: Place) -> ImageSet:
    """Training patches of a folder, with the model's labels and at the size of its images."""
    if not sampler.labels:
        raise UserError("--best_of chooses by the label, and this model is unconditional; leave it out")
    if sampler.stain_normalize != "none":
        say(f"note: the model learned from patches of one stain ({sampler.stain_normalize}); --best_of judges by them as they are")
    folder = at_hand(folder)
    files = [file for file in list_patches(folder) if file.split == "train"]
    if not files:
        raise UserError(f"{folder} has no training patches to learn the labels from; name another folder with --patches")
    files = [files[index] for index in choose(len(files), MOST_PATCHES, 0)]
    images = read_images([folder / file.path for file in files], reader(folder), sampler.image_size, "read training patches")
    return image_set(images, [known(class_of(file, sampler.condition)) for file in files])


def label_judge(sampler: Sampler, patches: ImageSet, asked: list[str]) -> LabelJudge:
    """What the patches teach about their labels, to EfficientNet-Lite0's features."""
    lite0, device = Lite0().to(sampler.device, memory_format=torch.channels_last), str(sampler.device)
    extractor = backbone("efficientnet-lite0-fine", LITE0_WEIGHTS.digest, lite0.fine_statistics, device, sampler.image_size)
    return LabelJudge(patches, asked, extractor)


if __name__ == "__main__":
    cli.run(main)
