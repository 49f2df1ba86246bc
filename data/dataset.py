"""A folder of patches, or of shards, as training data: labels, decoded pixels, augmentation."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError
from common.files import SURELY_LEFT, remove_leftovers, replacing
from common.labels import provider_in
from common.pictures import UNDECODABLE
from common.progress import say, track
from common.seeding import derive_seed
from data import manifest, shards
from data.augment import Augmentation
from data.findings import is_text, printable
from data.order import Draw
from data.panda import LABELS
from data.stain import StainNormalizer

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
CONDITIONS = ("none", "label", "isup", "label+provider", "isup+provider")
MAX_CACHE_BYTES = 16 * 2**30
MAX_SIDE = 8192  # a patch file that declares more is damaged or hostile
MAX_BAD_SHARE = 0.05
LARGEST_USUAL = 512  # pixels a side of a patch; larger ones are rather regions, or slides
AS_THEY_ARE = Augmentation(flips=0.0, quarter_turns=0.0)
STAIN_REFERENCES = 32  # training patches whose mixed stain is the common one
STAIN_PATCHES = 8  # of a slide, that its own stain is measured on


@dataclass(frozen=True, slots=True)
class PatchFile:
    """A patch of a folder: path relative to it; provider "" and grade None where unknown; split "train" or "test".

    slide_id: by patches.csv or the shards' index; without them by ``manifest.slide_by_path``.
    """

    path: str
    slide_id: str
    label: str
    data_provider: str
    isup_grade: int | None
    split: str


_FIELDS = tuple(field.name for field in fields(PatchFile))


def list_patches(folder: Path, way_out: str = "run extract_patches.py or name yours with --patches") -> list[PatchFile]:
    """All patches of a folder: by the index of its shards, or by patches.csv, or by LABEL sub-folders, or any images in it.

    Raises UserError, which ends with ``way_out``, when there is no folder or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of images at {folder}; {way_out}")
    if shards.is_sharded(folder):
        index = shards.open_shards(folder)
        files = [PatchFile(*values) for values in zip(*(index.column(name) for name in _FIELDS), strict=True)]
    elif (folder / manifest.NAME).exists():
        files = [PatchFile(*(getattr(row, name) for name in _FIELDS)) for row in manifest.read_manifest(folder)]
    else:
        files = _without_manifest(_pictures(folder))
    if not files:
        raise UserError(f"no images in {folder}; {way_out}")
    return files


def _pictures(folder: Path) -> list[str]:
    """Relative paths of the files below a folder that are named like pictures; not what is hidden or was set aside.

    Raises UserError for a name that is no text, as old archives unpack them.
    """
    below = manifest.entries_below(folder, lambda what: say(f"warning: left out of {folder}: {printable(what)}"))
    paths = sorted(str(path) for path, kind in below if path.suffix.lower() in SUFFIXES and kind == "file")
    for path in paths:
        if not is_text(path):
            raise UserError(f"{folder} holds {printable(path)}, whose name is no plain text; rename that file")
    return paths


def _without_manifest(paths: list[str]) -> list[PatchFile]:
    lone_split = manifest.has_lone_splits(paths)
    found = ((path, *manifest.by_path(path, lone_split)) for path in paths)
    return [PatchFile(path, manifest.slide_by_path(path), label, "", None, split or "train") for path, label, split in found]


def class_of(file: PatchFile, condition: str) -> str:
    """Name of the class that a patch belongs to under ``condition``; "" when unconditional.

    label: "gleason4"; isup: "isup0" .. "isup5", "unknown"; with the provider, where it is known: "gleason4-radboud". Folders of
    people's own may be named isup0 .. isup5 and are then grades as well.
    """
    what, _, provider = condition.partition("+")
    if what == "none":
        return ""
    if what == "label":
        name = file.label
    elif file.isup_grade is not None:
        name = f"isup{file.isup_grade}"
    else:
        name = file.label if re.fullmatch("isup[0-5]", file.label) else "unknown"
    return f"{name}-{file.data_provider}" if provider and file.data_provider else name


def condition_of(names: Iterable[str]) -> str:
    """The condition under which classes have such names, for want of a model that says it."""
    names = list(names)
    provided = [provider_in(name) for name in names]
    bare = {name.removesuffix(f"-{provider}") for name, provider in zip(names, provided, strict=True)}
    isup = bare and bare != {"unknown"} and all(re.fullmatch("isup[0-5]|unknown", name) for name in bare)
    return ("isup" if isup else "label") + ("+provider" if any(provided) else "")


def class_names(files: Sequence[PatchFile], condition: str) -> list[str]:
    """Classes under ``condition`` in a fixed order: PANDA's labels first, then others by name; [] when unconditional.

    Raises UserError when the patches hold fewer than two classes to tell apart.
    """
    if condition == "none":
        return []
    known = {label: rank for rank, label in enumerate(LABELS)}
    names = {class_of(file, condition) for file in files}
    names = sorted(names, key=lambda name: (known.get(name.partition("-")[0], len(known)), name))
    if len(names) < 2:
        raise UserError(f"--condition {condition} needs patches of at least two classes, found only {names}; use --condition none")
    return names


def _evenly(files: Sequence[PatchFile], count: int) -> list[PatchFile]:
    """At most ``count``, at even distances, the first and the last among them."""
    return [files[step] for step in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]


def content_of(folder: Path, path: str) -> Path | io.BytesIO:
    """What to open for a patch of ``folder``: its file, or its bytes in a shard. Raises OSError where its shard is gone."""
    return io.BytesIO(shards.open_shards(folder).content(path)) if shards.is_sharded(folder) else folder / path


def decode(source: Path | io.BytesIO, size: int) -> np.ndarray:
    """Image file -> (size, size, 3) uint8, the middle square, reduced by area averaging (enlarged bicubically).

    Raises OSError or ValueError when the file is missing, damaged, or declares more than MAX_SIDE pixels a side.
    """
    with Image.open(source) as image:
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"declares {image.size[0]} x {image.size[1]} pixels")
        if image.mode.startswith(("I", "F")):
            raise ValueError("holds grey values of more than 8 bits; save it as RGB")
        if image.has_transparency_data:  # what was cut away is glass: below it most programs leave black
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    resample = Image.Resampling.BOX if size < side else Image.Resampling.BICUBIC
    return np.asarray(image.crop(box) if size == side else image.resize((size, size), resample, box=box))


def reader(folder: Path) -> Callable[[Path, int], np.ndarray]:
    """decode(path, size) for the paths below ``folder``, which may hold shards."""
    return lambda path, size: decode(content_of(folder, path.relative_to(folder).as_posix()), size)


class PatchDataset(Dataset):
    """Patches as (image float (3, S, S) in [-1, 1], label int).

    folder, split: see ``list_patches``. condition: what the label says, one of CONDITIONS (0 when "none"). Pixels are decoded once
    into a memory-mapped cache beside the patches, which is built anew when any file changed; patches in shards, or more than
    MAX_CACHE_BYTES of them, are decoded whenever they are drawn. Undecodable patches are left out with a warning; more than
    MAX_BAD_SHARE of them is a UserError. ``classes`` fixes the numbering of labels (of a checkpoint).
    """

    def __init__(
        self,
        folder: Path,
        image_size: int,
        condition: str = "none",
        split: str | None = "train",
        augmentation: Augmentation | None = None,
        stain_normalize: str = "none",
        classes: Sequence[str] | None = None,
    ):
        self.folder, self.image_size, self.condition = Path(folder), image_size, condition
        self.augmentation = augmentation or AS_THEY_ARE
        everything = self._everything = list_patches(self.folder)
        self.files = [file for file in everything if split is None or file.split == split]
        if not self.files:
            raise UserError(f"no patches of split {split!r} in {folder}; extract patches from more slides")
        self.classes = class_names(self.files, condition) if classes is None else list(classes)
        strange = {class_of(file, condition) for file in self.files} - set(self.classes) if self.classes else set()
        if strange and split == "test":  # to judge by: what the model does not know it cannot be asked for
            self.files = [file for file in self.files if class_of(file, condition) not in strange]
            say(f"note: only held-out patches are of {', '.join(sorted(strange))}; they are left out")
        elif strange:
            raise UserError(f"{folder} holds {sorted(strange)}, which the model was not trained on; use the patches it knows")
        self._stain = stain_normalize
        self._pixels: np.ndarray | None = None
        self._gone: set[str] = set()  # went bad while they were needed
        self.report = say  # told of patches that go bad; must travel to worker processes
        kind = "" if stain_normalize == "none" else f"_{stain_normalize}_but_glass"
        self._cache = self.folder / f".decoded_{split or 'all'}_{self.image_size}{kind}.u8"
        if split == "train":
            self._say_if_resized()
            self._say_if_unlisted()
        self._open_pixels()

    def _say_if_resized(self) -> None:
        """By the first patch: all were cut alike."""
        with contextlib.suppress(*UNDECODABLE), Image.open(content_of(self.folder, self.files[0].path)) as image:
            side = min(image.size)
            if side < self.image_size:
                say(f"note: patches of {side} pixels are enlarged to {self.image_size}, which adds no detail")
            elif side > LARGEST_USUAL:
                say(f"note: patches of {side} pixels are reduced to {self.image_size}: cut them smaller where nuclei matter")

    def _say_if_unlisted(self) -> None:
        if (self.folder / manifest.NAME).exists():
            strays = set(_pictures(self.folder)).difference(manifest.plain(file.path) for file in self._everything)
            if strays:
                say(f"note: {len(strays)} pictures in {self.folder} have no row in {manifest.NAME} and are not trained on")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: int | Draw) -> tuple[Tensor, int]:
        """Patch by index (augmented by torch's global random state) or by a Draw of the order (augmented by its seed)."""
        if not isinstance(draw, Draw):
            draw = Draw(draw, int(torch.randint(2**62, ())))
        pixels = torch.from_numpy(self.pixels(draw.index)).permute(2, 0, 1)
        return self.augmentation(pixels, draw.seed), self.label(draw.index)

    @property
    def decodes(self) -> bool:
        """Whether patches are decoded whenever they are drawn."""
        return self._pixels is None

    def label(self, index: int) -> int:
        """Number of a patch's class in ``classes``; 0 when unconditional."""
        name = class_of(self.files[index], self.condition)
        return self.classes.index(name) if self.classes else 0

    def pixels(self, index: int) -> np.ndarray:
        """Decoded patch before augmentation: (S, S, 3) uint8."""
        if self._pixels is None:
            self._prepare = self._prepare or self._preparation()
            return np.array(self._decoded(index))
        return np.array(self._pixels[index])

    def _decoded(self, index: int) -> np.ndarray:
        """Pixels of a file; of the next one of its class where it went bad since the start. Raises UserError when many did."""
        for other in (*range(index, len(self.files)), *range(index)):
            if self.label(other) != self.label(index):
                continue
            try:
                return self._prepare(self.files[other])
            except UNDECODABLE as error:
                path = self.files[other].path
                if path not in self._gone:
                    self._gone.add(path)
                    self.report(
                        f"warning: {self.folder / path} went bad during training and is skipped ({len(self._gone)} so far): {error}"
                    )
                if len(self._gone) > MAX_BAD_SHARE * len(self.files):
                    break
        raise UserError(
            f"{len(self._gone)} of {len(self.files)} patches in {self.folder} can no longer be read; bring them back, run "
            "check_data.py, and go on with --resume"
        )

    def other_split(self, split: str) -> PatchDataset | None:
        """The patches of another split as they are, with the same numbering of labels; None where there are none."""
        if not any(file.split == split and class_of(file, self.condition) in (self.classes or [""]) for file in self._everything):
            return None
        return PatchDataset(
            self.folder, self.image_size, self.condition, split, stain_normalize=self._stain, classes=self.classes or None
        )

    def drawn(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """At most ``count`` patches at random, not augmented: images (N, 3, S, S) in [-1, 1], numbers of their classes (N,)."""
        chosen = [int(index) for index in np.random.default_rng(seed).permutation(len(self))[:count]]
        images = [AS_THEY_ARE(torch.from_numpy(self.pixels(index)).permute(2, 0, 1), 0) for index in chosen]
        return torch.stack(images), torch.tensor([self.label(index) for index in chosen])

    def groups(self) -> list[Hashable]:
        """What the order balances over, a key for each patch: label (or grade) and provider."""
        what = self.condition.partition("+")[0]
        names = [file.isup_grade if what == "none" else class_of(file, what) for file in self.files]
        return [(name, file.data_provider) for name, file in zip(names, self.files, strict=True)]

    def class_counts(self) -> list[int]:
        """Patches of each class, in the order of ``classes``."""
        counts = Counter(class_of(file, self.condition) for file in self.files)
        return [counts[name] for name in self.classes]

    def __getstate__(self) -> dict:
        # A memory map travels to a worker process as its file name, not as its gigabytes.
        return self.__dict__ | {"_prepare": None, "_pixels": None if isinstance(self._pixels, np.memmap) else self._pixels}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._pixels is None and self._cache.exists():
            self._pixels = self._map()

    # -- the decoded cache

    def _map(self) -> np.memmap:
        return np.memmap(self._cache, dtype=np.uint8, mode="r", shape=(len(self.files), self.image_size, self.image_size, 3))

    def _open_pixels(self) -> None:
        self._prepare = None  # until something is decoded
        wanted = len(self.files) * self.image_size**2 * 3
        if shards.is_sharded(self.folder):
            return
        if wanted > MAX_CACHE_BYTES:
            say(f"patches are decoded again in each epoch: a cache would take {wanted / 2**30:.0f} GiB")
            return
        note = self._cache.with_suffix(".json")
        fingerprint = self._fingerprint()
        remove_leftovers(self.folder, self._cache.name, idle=SURELY_LEFT)
        if self._is_current(note, fingerprint, wanted):
            left_out = set(json.loads(note.read_text())["bad"])
            bad = {file.path: self._why_not(file) for file in self.files if file.path in left_out}
            if all(bad.values()):  # else one can be read by now
                self._leave_out(bad)
                self._pixels = self._map()
                return
        pixels, bad = self._decode_all()
        try:
            with replacing(self._cache) as file:
                file.write(memoryview(pixels).cast("B"))
            with replacing(note, "w") as file:
                json.dump({"fingerprint": fingerprint, "bad": sorted(bad)}, file)
        except OSError as error:
            say(f"warning: decoded patches stay in memory, the cache could not be written ({error})")
            self._pixels = pixels
            return
        self._pixels = self._map()

    def _is_current(self, note: Path, fingerprint: list, wanted: int) -> bool:
        try:
            stored = json.loads(note.read_text())
            size = self._cache.stat().st_size
        except (OSError, ValueError):
            return False
        return stored.get("fingerprint") == fingerprint and size == wanted - len(stored["bad"]) * self.image_size**2 * 3

    def _fingerprint(self) -> list:
        """Changes whenever the name, size or time of a file changes, or of one that the stain is taken from."""
        lines = []
        for file in (*self.files, *self._stain_references()):
            try:
                status = os.stat(self.folder / file.path)
                lines.append(f"{file.path} {status.st_size} {status.st_mtime_ns}")
            except OSError:
                lines.append(f"{file.path} missing")
        return [len(lines), derive_seed(0, "\n".join(lines))]

    def _preparation(self) -> Callable[[PatchFile], np.ndarray]:
        """File -> pixels, stain-normalised where asked, slide by slide; the target is the training patches' own mixed stain."""
        if self._stain == "none":
            return self._plain
        references = self._readable(self._stain_references())
        if not references:
            raise UserError(f"no patch of {self.folder} to take the stain from can be read; run check_data.py --quarantine")
        normalizer = StainNormalizer(self._stain, references)
        slides, stains = defaultdict(list), {}
        for file in self.files:
            slides[file.slide_id].append(file)

        def normalized(file: PatchFile) -> np.ndarray:
            patch, slide = self._plain(file), file.slide_id
            if slide not in stains:
                stains[slide] = normalizer.measure(self._readable(_evenly(slides[slide], STAIN_PATCHES)))
            return normalizer.normalize(patch, stains[slide]) if stains[slide] else patch

        return normalized

    def _plain(self, file: PatchFile) -> np.ndarray:
        return decode(content_of(self.folder, file.path), self.image_size)

    def _why_not(self, file: PatchFile) -> str:
        """Why a patch cannot be read; "" where it can."""
        try:
            self._plain(file)
        except UNDECODABLE as error:
            return str(error) or type(error).__name__
        return ""

    def _leave_out(self, bad: dict[str, str]) -> None:
        """Go on without these patches (path -> reason). Raises UserError when they are many."""
        for path, reason in sorted(bad.items()):
            say(f"warning: patch left out, it cannot be read: {path} ({reason})")
        if len(bad) > MAX_BAD_SHARE * len(self.files):
            raise UserError(
                f"{len(bad)} of {len(self.files)} patches in {self.folder} cannot be read; run check_data.py --quarantine"
            )
        self.files = [file for file in self.files if file.path not in bad]

    def _readable(self, files: Iterable[PatchFile]) -> list[np.ndarray]:
        """Pixels of those that can be read; of the others it is said where they themselves are decoded."""
        patches = []
        for file in files:
            with contextlib.suppress(*UNDECODABLE):
                patches.append(self._plain(file))
        return patches

    def _stain_references(self) -> list[PatchFile]:
        """The training patches whose mixed stain all patches get; [] where they keep their own."""
        training = [file for file in self._everything if file.split == "train"] if self._stain != "none" else []
        return _evenly(training, STAIN_REFERENCES)

    def _decode_all(self) -> tuple[np.ndarray, set[str]]:
        pixels = np.empty((len(self.files), self.image_size, self.image_size, 3), dtype=np.uint8)
        bad: dict[str, str] = {}
        self._prepare = self._preparation()

        def one(index: int) -> None:
            try:
                pixels[index] = self._prepare(self.files[index])
            except UNDECODABLE as error:
                bad[self.files[index].path] = str(error)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in track(pool.map(one, range(len(self.files))), "decode patches", len(self.files), "patches"):
                pass
        keep = [index for index, file in enumerate(self.files) if file.path not in bad]
        self._leave_out(bad)
        return (pixels[keep] if bad else pixels), set(bad)
