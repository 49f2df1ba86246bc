"""Train a GAN on a folder of patches.

python train.py --epochs 200 --batch_size 8
python train.py --epochs 300 --batch_size 8 --resume checkpoints/G_final.pt     # 100 epochs more; --epochs counts in total
python train.py --resume                          # go on from the newest whole checkpoint
nohup python train.py --epochs 200 > /dev/null 2>&1 &       # then: tail -f logs/train.log
torchrun --nproc_per_node 8 train.py --batch_size 64 --epochs 200
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from common import cli
from common.errors import UserError
from common.pictures import save, to_uint8
from common.progress import say
from data.augment import Augmentation
from data.copies import at_hand
from data.dataset import PatchDataset, list_patches
from data.order import BalancedOrder, BatchesFrom
from data.resident import Resident, fits
from data.show import augmented_grid, real_grid
from metrics.watch import COUNT, FEWEST, Watch
from models.config import ModelConfig
from models.features import LITE0_WEIGHTS
from models.layers import reduced
from training import checkpoint, options, presets, processes, resume
from training.config import TrainConfig
from training.device import calculates_in_half, check_speed_ups, choose_device
from training.dry_run import dry_run
from training.lock import folders_of_a_run
from training.run import Follower, Habits, HeldOut, Run
from training.runlog import Notes, RunLog, SilentLog, log_line, noted
from training.signals import SignalRequests
from training.trainer import Trainer


def main() -> int:
    parser = options.make_parser(__doc__)
    args = parser.parse_args()
    options.check(parser, args)
    with noted(args.log_dir / args.run_name, not options.only_looks(args)) as notes:
        return begin(args, notes)


def begin(args, notes: Notes) -> int:
    """Say what a run would be, or train; returns the exit code."""
    if args.backbone_weights:
        LITE0_WEIGHTS.use(args.backbone_weights)
    together, device = processes.join(choose_device(args.device))
    check_speed_ups(device, args.precision == "bfloat16", args.compile)
    folder, log_folder = args.checkpoint_dir / args.run_name, args.log_dir / args.run_name
    source, state = resume.find_state(args, folder, log_folder)
    args.patches = resume.patches_of(args, state)
    here = at_hand(args.patches)
    config = resume.merged_config(args, state, Augmentation().to_dict()) if state else new_config(args, here)
    if not state:
        presets.model_config(args, 0, device)  # what it refuses is refused before patches are read
    with together.first_goes_ahead():  # it writes the cache of decoded patches
        dataset = open_patches(here, args, config, state)
    if args.preview_augmentation:
        save(augmented_grid(dataset, config.seed), args.preview_augmentation)
        say(f"{args.preview_augmentation}: left column before augmentation, seven augmentations beside each")
        return 0
    model = ModelConfig.from_dict(state["model"]) if state else presets.model_config(args, len(dataset.classes), device)
    trainer = Trainer(model, config, dataset.classes, dataset.class_counts(), len(dataset), device, together)
    if state:
        presets.check_same_networks(args, model)
        resume.restore(trainer, state, folder)
    trainer.speed_up(calculates_in_half(config.precision, device), args.compile)
    if trainer.images >= trainer.images_total and (args.dry_run or checkpoint.is_complete(folder)):
        say(f"{source} has {trainer.epoch:.0f} of {config.epochs} epochs: nothing left to do; a larger --epochs trains on")
        return 0
    if is_beyond_end(trainer, state):
        raise UserError(f"{source} is at epoch {trainer.epoch:.2f}, beyond --epochs {config.epochs}; give a larger number to go on")
    if args.dry_run:
        return dry_run(trainer, make_loader(trainer, dataset, args.workers))
    code = train(args, trainer, dataset, source, folder, log_folder, notes)
    processes.leave(together)
    return code


def is_beyond_end(trainer: Trainer, state: dict | None) -> bool:
    """Whether a resumed run is further than --epochs, by a whole batch: less is a run that was stopped before its last files."""
    batch = max(trainer.config.batch_size, (state or {}).get("config", {}).get("batch_size", 0))
    return round((trainer.epoch - trainer.config.epochs) * trainer.images_per_epoch) >= batch


def open_patches(folder: Path, args, config: TrainConfig, state: dict | None) -> PatchDataset:
    """The patches, as the checkpoint knows them where there is one."""
    size = state["model"]["image_size"] if state else presets.patch_size(args)
    augmentation = Augmentation(**config.augmentation)
    augmentation.check(size)
    return PatchDataset(
        folder,
        size,
        config.condition,
        augmentation=augmentation,
        stain_normalize=config.stain_normalize,
        classes=state["classes"] if state else None,
    )


def new_config(args, folder: Path) -> TrainConfig:
    """Settings of a new run on the patches of ``folder``."""
    augmentation = Augmentation(**options.given(args, options.AUGMENTATIONS)).to_dict()
    return presets.new_config(args, augmentation, lambda: {file.label for file in list_patches(folder) if file.split == "train"})


def make_loader(trainer: Trainer, dataset: PatchDataset, workers: int | None) -> DataLoader | Resident:
    """Batches from the trainer's place on the clock to the end of the run; from the GPU's memory where all patches fit there."""
    order = BalancedOrder(dataset.groups(), trainer.config.seed)
    rank, world = trainer.processes.rank, trainer.processes.world
    batches = BatchesFrom(order, trainer.config.batch_size, trainer.images, trainer.images_total, rank, world)
    if workers is None and fits(dataset, trainer.device):
        return Resident(dataset, batches, trainer.device)
    cuda = trainer.device.type == "cuda"
    if workers is None:
        workers = 2 if cuda or dataset.decodes or not dataset.augmentation.symmetries_only else 0
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=cuda)


def train(args, trainer: Trainer, dataset: PatchDataset, source: Path | None, folder: Path, log_folder: Path, notes: Notes) -> int:
    """Train to the end or to a signal; the exit code says which."""
    requests, first = SignalRequests(), trainer.processes.first
    requests.install()
    with folders_of_a_run(folder, log_folder) if first else nullcontext():
        log = RunLog(log_folder, args.tensorboard) if first else SilentLog(log_folder)
        notes.open()
        log.rewind(trainer.images, trainer.epoch)
        dataset.report = partial(log_line, log_folder)  # also from worker processes
        log.line(presets.in_words(trainer, len(dataset), source))
        log.picture("real.png", real_grid(dataset, trainer.model.output_size), trainer.images)
        habits = Habits.of(trainer.config, folder)
        held_out = held_out_patches(dataset, trainer, habits.eval_every > 0) if first else None
        run = (Run if first else Follower)(trainer, habits, folder, log, requests, held_out)
        stopped = run.train(lambda: make_loader(trainer, dataset, args.workers))
        log.close()
    return 128 + stopped if stopped is not None else 0


def held_out_patches(dataset: PatchDataset, trainer: Trainer, scored: bool) -> HeldOut | None:
    """At most COUNT patches of the test split to judge and score against; without one of the training split, if ``scored``."""
    held_out = dataset.other_split("test")
    enough = len(dataset) >= FEWEST
    if held_out is None or len(held_out) < FEWEST:
        if not scored:
            return None
        if not enough:
            say("note: too few patches to score by; there are no scores during training")
            return None
        held_out = dataset
        say("note: too few held-out patches to score by; scores during training are against the training patches")
    side, unseen = trainer.model.output_size, held_out is not dataset

    def as_they_come_out(patches: PatchDataset) -> tuple[np.ndarray, list[str]]:
        images, numbers = patches.drawn(COUNT, 0)  # the same ones for every --seed, so that runs can be compared
        return to_uint8(reduced(images, side)), [patches.classes[number] if patches.classes else "" for number in numbers]

    trained_on = partial(as_they_come_out, dataset) if unseen and enough else None
    real, labels = as_they_come_out(held_out)
    watch = Watch(real, trainer.config.seed, str(trainer.device), trained_on=trained_on, labels=labels)
    return HeldOut(held_out.drawn if unseen else None, dataset.drawn, watch)


if __name__ == "__main__":
    cli.run(main)
