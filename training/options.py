"""The flags of train.py. Those without a value are taken from the checkpoint when resuming, else from TrainConfig's defaults."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.cli import Parser, fraction, natural, non_negative_float, picture_file, positive_float, positive_int
from common.storage import place
from models.augment import KINDS
from models.config import DISCRIMINATORS, MODELS, NORMS, WIDTHS
from models.losses import OBJECTIVES
from training.processes import world_size

# Flags that a checkpoint holds: name -> whether a resumed run may change it.
RUN_FLAGS = {
    "epochs": True,
    "batch_size": True,
    "lr_g": True,
    "lr_d": True,
    "label_smoothing": True,
    "seed": False,
    "stain_normalize": False,
    "objective": True,
    "r1": True,
    "r2": True,
    "gradient_penalty": True,
    "perceptual": True,
    "grading": True,
    "adaptive": True,
    "warmup_images": True,
    "lr_decay": True,
    "grow_images": False,
    "save_every": True,
    "keep": True,
    "sample_every": True,
    "eval_every": True,
    "precision": True,
    "auto_batch": True,
}
# Flags that shape the improved model's networks, passed on to improved_config.
MODEL_FLAGS = ("preset", "discriminator", "norm", "attention", "spectral_norm", "grow_from", "window")
AUGMENTATIONS = {
    "flips": (fraction, "probability of each mirror image, 0..1; default 0.5, tissue has no handedness"),
    "quarter_turns": (fraction, "probability of a turn by 90, 180 or 270 degrees, 0..1; default 0.75, tissue has no upright"),
    "rotation": (
        non_negative_float,
        "largest free rotation in degrees, 0..45; default 0, since it mirrors tissue into the corners and softens",
    ),
    "color_jitter": (
        fraction,
        "relative change of brightness, contrast, saturation, 0..1; default 0, the generator would learn it",
    ),
    "elastic": (non_negative_float, "elastic displacement in pixels, root mean square; default 0, it bends nuclei"),
    "noise": (non_negative_float, "noise in grey levels of 255, standard deviation; default 0, the generator would learn it"),
    "stain_jitter": (fraction, "relative change of each stain in optical density, 0..1; default 0, the generator would learn it"),
}


def make_parser(description: str) -> argparse.ArgumentParser:
    """All flags of train.py in groups."""
    parser = Parser(description)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--patches",
        type=place,
        metavar="DIR",
        help="folder of patches or shards, or its URL such as s3://BUCKET/shards; default datasets/patches, and when resuming the "
        "folder of the run",
    )
    data.add_argument(
        "--stain_normalize",
        choices=("none", "macenko", "reinhard"),
        help="give all slides one stain, measured slide by slide (patches not named SLIDE_X_Y: each by itself, which distorts pale "
        "ones: look at logs/samples/real.png); default none",
    )
    data.add_argument(
        "--workers",
        type=natural,
        help="loader processes; default 0, 2 where preparing patches costs time, and on CUDA none where they fit into its memory",
    )
    augment = parser.add_argument_group("augmentation of the training patches")
    for name, (kind, text) in AUGMENTATIONS.items():
        augment.add_argument(f"--{name}", type=kind, help=text)
    augment.add_argument(
        "--preview_augmentation",
        type=picture_file,
        metavar="FILE",
        help="write a picture of patches as the flags above change them, and leave",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help="architecture; default improved")
    model.add_argument("--image_size", type=int, choices=(64, 128, 256), help="side of the images in pixels; default 256")
    model.add_argument(
        "--condition",
        choices=("none", "label", "isup", "label+provider", "isup+provider"),
        help="what the images depend on; default label where there are two or more, else none; with +provider the hospital too",
    )
    _improved(parser.add_argument_group("the improved model"))
    _training(parser.add_argument_group("training"))
    _objective(parser.add_argument_group("objective"))
    _files(parser.add_argument_group("files and machine"))
    return parser


def _improved(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--preset", choices=tuple(WIDTHS), help="size of the networks; default cpu, gpu on CUDA")
    group.add_argument("--discriminator", choices=DISCRIMINATORS, help="on frozen features, or on pixels alone; default projected")
    group.add_argument(
        "--backbone_weights",
        type=Path,
        metavar="FILE",
        help="EfficientNet-Lite0's weights for the discriminator and the feature matching; default the installed package's",
    )
    group.add_argument("--norm", choices=NORMS, help="how the style acts on the generator's layers; default demodulation")
    switch = argparse.BooleanOptionalAction
    group.add_argument("--attention", action=switch, default=None, help="self-attention at 16x16; default on")
    group.add_argument(
        "--spectral_norm", action=switch, default=None, help="spectral norm of the discriminator's weights; default on"
    )
    group.add_argument(
        "--grow_from",
        type=int,
        choices=(16, 32, 64, 128, 256),
        help="progressive growing from this side in pixels; default 64, and none for images of 64",
    )
    group.add_argument(
        "--window",
        type=int,
        choices=(64, 128, 256),
        help="largest side in pixels that the discriminator sees at once; larger images it sees in turn as windows and whole at "
        "half size; default 128, and 64 for images of 64, which are painted at 128 and averaged down",
    )
    group.add_argument("--grow_images", type=positive_int, help="images of each phase of growing; default 10000")


def _objective(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--objective", choices=OBJECTIVES, help="what both networks minimise; default non_saturating")
    group.add_argument(
        "--r1",
        type=non_negative_float,
        help="weight of the gradient penalty on real images; default 0.5; 0 with hinge, wgan, and dcgan without relativistic",
    )
    group.add_argument("--r2", type=non_negative_float, help="the same on generated images; default 0, with relativistic 0.5")
    group.add_argument(
        "--gradient_penalty", type=non_negative_float, help="weight of WGAN-GP's gradient penalty; default 10 with wgan, else 0"
    )
    group.add_argument(
        "--perceptual",
        type=non_negative_float,
        help="weight of feature matching, the generator's loss on frozen features; default 3, for dcgan 0",
    )
    group.add_argument(
        "--grading", type=non_negative_float, help="weight of showing the label as clearly as real patches; default 0"
    )
    group.add_argument(
        "--adaptive",
        nargs="*",
        choices=KINDS,
        help="augmentation in front of the discriminator, as strong as it needs; no kind switches it off; "
        "default translation color stain, for dcgan none",
    )
    group.add_argument(
        "--warmup_images", type=natural, help="images over which the learning rates rise from 0; default 2000, for dcgan 0"
    )
    group.add_argument(
        "--lr_decay",
        choices=("none", "late", "cosine"),
        help="fall of both learning rates to 0: over the last quarter of the run, or all of it; default none",
    )


def _training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=positive_int, help="epochs in total, those before a resume included; default 200")
    group.add_argument("--batch_size", type=positive_int, help="images a step, at least 2; default 8")
    group.add_argument(
        "--lr_g",
        type=positive_float,
        help="learning rate of the generator; default 2e-3, with larger batches than 8 more, twice that from 32 on; dcgan 2e-4",
    )
    group.add_argument(
        "--lr_d",
        type=positive_float,
        help="learning rate of the discriminator; default 5e-4, with larger batches than 8 more, twice that from 32 on; dcgan 2e-4",
    )
    group.add_argument("--label_smoothing", type=fraction, help="real images get the target 1 minus this; default 0, for dcgan 0.1")
    group.add_argument("--seed", type=natural, help="decides weights, order and noise; default 0")
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from FILE, or from the run's newest whole checkpoint, which also stands in for a G_final.pt that was gone on "
        "with; going back to another FILE keeps latest.pt as kept_epoch_0230.pt",
    )


def _files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint_dir", type=Path, default=Path("checkpoints"), metavar="DIR", help="where weights go; default %(default)s"
    )
    group.add_argument(
        "--log_dir", type=Path, default=Path("logs"), metavar="DIR", help="where log, report and samples go; default %(default)s"
    )
    group.add_argument(
        "--run_name", default="", metavar="NAME", help="put checkpoints and logs in sub-folders of this name; default none"
    )
    group.add_argument(
        "--save_every",
        type=positive_int,
        metavar="EPOCHS",
        help="epochs between numbered checkpoints; default 10",
    )
    group.add_argument("--sample_every", type=positive_int, metavar="EPOCHS", help="epochs between sample pictures; default 5")
    group.add_argument(
        "--eval_every",
        type=natural,
        metavar="EPOCHS",
        help="epochs between scores (KID, precision, recall), 0 never; default 20, less often where that would take more than "
        "5 percent of the time",
    )
    group.add_argument("--keep", type=positive_int, help="numbered checkpoints kept; default 3")
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard event files too; default off")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default %(default)s")
    group.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="numbers of convolutions in training; bfloat16 on CUDA alone, CPUs gain little by it or lose; default float32",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile for the generator: minutes at each resolution, then faster steps; default off",
    )
    group.add_argument(
        "--auto_batch",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="when GPU memory is full, take each batch in parts: slower, the same result; default off",
    )
    group.add_argument("--dry_run", action="store_true", help="print configuration, size, memory and time per epoch, and leave")


def only_looks(args: argparse.Namespace) -> bool:
    """Whether nothing is trained nor written into a run's folders."""
    return bool(args.dry_run or args.preview_augmentation)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values and combinations that cannot be meant (exit 2)."""
    if args.batch_size == 1:
        parser.error("--batch_size 1 leaves batch normalisation nothing to average; use at least 2")
    if args.model == "dcgan" and (others := given(args, (*MODEL_FLAGS, "grow_images"))):
        parser.error(f"--{next(iter(others))} belongs to --model improved, which dcgan is not; leave one of the two out")
    if world_size() > 1:
        for name in ("dry_run", "preview_augmentation", "auto_batch"):
            if getattr(args, name):
                parser.error(f"--{name} works in one process; start without torchrun")
    if args.rotation is not None and args.rotation > 45:
        parser.error("--rotation goes up to 45 degrees; quarter turns do the rest")
    if args.label_smoothing is not None and args.label_smoothing >= 0.5:
        parser.error("--label_smoothing must be below 0.5, or real and fake change sides")
    if args.run_name and (Path(args.run_name).name != args.run_name or args.run_name.startswith(".")):
        parser.error("--run_name is one folder name, without slashes")


def given(args: argparse.Namespace, names) -> dict:
    """The flags among ``names`` that the user typed, by name."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
