"""Turn a checkpoint into images, ready for augmenting a classifier.

python generate.py --checkpoint checkpoints/G_final.pt --num 500 --label gleason4 --out synthetic/
python generate.py --checkpoint checkpoints/G_final.pt --num 2000 --out synthetic/            every label in turn
python generate.py --checkpoint checkpoints/G_final.pt --grid samples.png
python generate.py --checkpoint checkpoints/G_final.pt --interpolate walk.mp4 --label benign
torchrun --nproc_per_node 8 -- generate.py --num 100000 --out synthetic/        the same images by eight processes
"""

import argparse
import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import cli
from common.errors import UserError
from common.files import replacing, sha256
from common.film import SUFFIXES, write_film
from common.pictures import grid, png
from common.progress import say, track
from metrics.images import known as known_label
from training import processes
from training.device import choose_device
from training.processes import Processes
from training.sampling import CHUNK, Sampler, closed_walk, latent, load_sampler

COLUMNS = ("path", "label", "index", "seed", "truncation", "checkpoint", "checkpoint_sha256")
GRID_COLUMNS = 8
STOPS, FRAMES_BETWEEN_STOPS, FRAMES_PER_SECOND = 6, 24, 12


def main() -> int:
    args = parse()
    cli.terminate_like_interrupt()
    together, device = processes.join(choose_device(args.device))
    sampler = load_sampler(args.checkpoint, device)
    if args.grid and together.first:
        draw_grid(sampler, args)
    if args.interpolate and together.first:
        film(sampler, args)
    if args.num:
        write_images(sampler, args, together)
    processes.leave(together)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--checkpoint", type=Path, default=Path("checkpoints/G_final.pt"), metavar="FILE", help="default %(default)s")
    what.add_argument(
        "--num", type=cli.positive_int, help="images to write, shared evenly among the labels where --label is not given"
    )
    what.add_argument("--label", help="one class of the model, such as gleason4 or isup3; default each in turn, but not unlabelled")
    what.add_argument("--grid", type=Path, metavar="FILE", help="write one picture with a row for each label")
    what.add_argument("--interpolate", type=Path, metavar="FILE", help="write a walk through the latent space as .gif or .mp4")
    what.add_argument(
        "--seed", type=cli.natural, default=0, help="image k follows from seed, label and k alone; default %(default)s"
    )
    what.add_argument(
        "--truncation", type=cli.fraction, default=1.0, help="0..1, below 1 more typical and less varied; default %(default)s"
    )
    where = parser.add_argument_group("where")
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
    if args.interpolate and args.interpolate.suffix.lower() not in SUFFIXES:
        parser.error("--interpolate writes .gif or .mp4; give the file one of these endings")
    return args


def labels_of(sampler: Sampler, label: str | None) -> list[str]:
    """Labels to draw: the one asked for, else all that say something; [""] for an unconditional model."""
    if label is not None:
        sampler.number(label)  # an unknown label is an error that lists the known ones
        return [label]
    return [name for name in sampler.labels if known_label(name)] or [""]


def write_images(sampler: Sampler, args: argparse.Namespace, together: Processes) -> None:
    """OUT/LABEL/000042.png for each image and one manifest; images that are there already are kept, so that a run can go on."""
    labels = labels_of(sampler, args.label)
    shares = {label: args.num // len(labels) + (rank < args.num % len(labels)) for rank, label in enumerate(labels)}
    digest = sha256(args.checkpoint)
    rows = read_rows(args.out / "manifest.csv", digest, args)
    known = {path for path in rows if (args.out / path).exists()}
    paths = {label: [f"{folder_of(label)}/{index:06d}.png" for index in range(shares[label])] for label in labels}
    for label in labels:
        (args.out / folder_of(label)).mkdir(parents=True, exist_ok=True)
        common = (args.seed, args.truncation, args.checkpoint.as_posix(), digest)
        rows |= {path: (path, folder_of(label), index, *common) for index, path in enumerate(paths[label])}
    with together.first_goes_ahead():
        if together.first:  # before any image, so that what a killed run leaves behind is known for ours
            write_manifest(args.out / "manifest.csv", rows)
    jobs = [(label, start) for label in labels for start in range(0, shares[label], CHUNK)][together.rank :: together.world]
    with ThreadPoolExecutor(2) as pool:
        being_written = iter(())
        for label, start in track(jobs, "generate", unit=f"groups of {CHUNK}"):
            wanted = paths[label][start : start + CHUNK]
            if not known.issuperset(wanted):
                images = sampler.sample(len(wanted), args.seed, label, start, args.truncation)
                list(being_written)  # waits for the group before, and raises what went wrong with it
                being_written = pool.map(save_png, [args.out / path for path in wanted], images)
        list(being_written)
    together.wait()
    say(f"{args.num} images in {args.out} ({', '.join(f'{folder_of(label)} {count}' for label, count in shares.items())})")


def write_manifest(path: Path, rows: dict[str, tuple]) -> None:
    with replacing(path, "w") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *(rows[name] for name in sorted(rows))])


def folder_of(label: str) -> str:
    return label or "unconditional"


def read_rows(path: Path, digest: str, args: argparse.Namespace) -> dict[str, tuple]:
    """Rows of an earlier call into the same folder. Raises UserError when its images came from another checkpoint or seed."""
    if not path.exists():
        foreign = next(args.out.glob("*/*.png"), None) if args.out.is_dir() else None
        if foreign:
            raise UserError(f"{args.out} holds images without a manifest ({foreign.name}); choose another --out")
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        rows = {row["path"]: tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file)}
    for row in rows.values():
        if (row[3], float(row[4]), row[6]) != (str(args.seed), args.truncation, digest):
            raise UserError(f"{args.out} holds images of another checkpoint, seed or truncation; choose another --out")
    return rows


def save_png(path: Path, image: np.ndarray) -> None:
    with replacing(path, durable=False) as file:
        file.write(png(image))


def draw_grid(sampler: Sampler, args: argparse.Namespace) -> None:
    """One picture: a row for each label, or four rows of an unconditional model."""
    labels = labels_of(sampler, args.label)
    rows = labels if labels != [""] else [""] * 4
    images = [sampler.sample(GRID_COLUMNS, args.seed, label, GRID_COLUMNS * row, args.truncation) for row, label in enumerate(rows)]
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    grid(np.concatenate(images), GRID_COLUMNS, labels if labels != [""] else ()).save(args.grid)
    say(f"{args.grid}: {len(rows)} rows of {GRID_COLUMNS} images")


def film(sampler: Sampler, args: argparse.Namespace) -> None:
    """A closed walk between random latents."""
    label = labels_of(sampler, args.label)[0]
    stops = torch.stack([latent(sampler.config, args.seed, f"walk {label}", stop) for stop in range(STOPS)])
    walk = closed_walk(stops, FRAMES_BETWEEN_STOPS) * args.truncation
    args.interpolate.parent.mkdir(parents=True, exist_ok=True)
    write_film(args.interpolate, sampler.render(walk, [label] * len(walk)), FRAMES_PER_SECOND)
    say(f"{args.interpolate}: {len(walk)} frames between {STOPS} images{f' of {label}' if label else ''}")


if __name__ == "__main__":
    cli.run(main)
