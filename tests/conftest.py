"""Fixtures that more than one test file uses: a folder of tiny slides in PANDA's layout, drawn here."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

SLIDE_SIDE = 1024
TILE = 256
MPP = {"radboud": 0.4862, "karolinska": 0.5032}
# (image_id, provider, grade, score, mask values of the four quarters of its tissue)
TINY_SLIDES = (
    ("aaa1", "radboud", 0, "negative", (2, 2, 2, 1)),
    ("aaa2", "radboud", 5, "4+5", (4, 5, 4, 5)),
    ("aaa3", "radboud", 1, "3+3", (3, 3, 2, 0)),
    ("bbb1", "karolinska", 0, "0+0", (1, 1, 1, 1)),
    ("bbb2", "karolinska", 4, "4+4", (2, 2, 1, 2)),
    ("bbb3", "karolinska", 2, "3+4", (2, 2, 2, 1)),
)


@pytest.fixture(scope="session", autouse=True)
def _default_signals():
    """Programs under test inherit what is ignored, and nohup or a background job ignores the very signals that are tested."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def sizes(paths: Iterable[Path]) -> list[int]:
    """Bytes of the files among ``paths`` that are still there: others move and delete them in the meantime."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append(path.stat().st_size)
    return found


def write_pyramid(path: Path, image: np.ndarray, mpp: float | None = 0.5, compression: str = "jpeg", tile: int = TILE) -> None:
    """Write (H, W, 3) uint8 as a tiled pyramid of levels 1, 4 and 16, as PANDA's: JPEG for slides, "lzw" for masks."""
    options = {"photometric": "rgb", "tile": (tile, tile), "compression": compression}
    if compression == "jpeg":
        options["compressionargs"] = {"level": 90}
    if mpp is not None:
        options |= {"resolution": (10_000 / mpp, 10_000 / mpp), "resolutionunit": "CENTIMETER"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 4, 16):
            tiff.write(np.ascontiguousarray(image[::step, ::step]), subfiletype=int(step > 1), **options)


def tissue_texture(height: int, width: int, seed: int, colour: tuple[int, int, int] = (205, 130, 185)) -> np.ndarray:
    """Something of H&E's colours, sharp and irregular, (height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    cells = generator.random((height // 4 + 1, width // 4 + 1)).repeat(4, 0).repeat(4, 1)[:height, :width, None]
    nuclei = np.where(cells > 0.8, np.array([0.5, 0.5, 0.75]), 1.0)
    return np.clip(np.array(colour) * nuclei + generator.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def draw_slide(seed: int = 0, side: int = SLIDE_SIDE, colour: tuple[int, int, int] = (205, 130, 185)) -> np.ndarray:
    """A slide of ``side`` pixels: one square of tissue, three quarters of a side wide, on white."""
    image = np.full((side, side, 3), 255, np.uint8)
    edge, width = side // 8, side * 3 // 4
    image[edge : edge + width, edge : edge + width] = tissue_texture(width, width, seed, colour)
    return image


def draw_mask(quarters: tuple[int, int, int, int], side: int = SLIDE_SIDE) -> np.ndarray:
    """The mask that belongs to ``draw_slide``: one value for each quarter of the tissue, in the red channel."""
    mask = np.zeros((side, side, 3), np.uint8)
    edge, half = side // 8, side * 3 // 8
    for i, value in enumerate(quarters):
        y, x = edge + i // 2 * half, edge + i % 2 * half
        mask[y : y + half, x : x + half, 0] = value
    return mask


def write_panda_folder(folder: Path, side: int = SLIDE_SIDE, tile: int = TILE) -> Path:
    """Six slides of ``side`` pixels with masks and train.csv in PANDA's layout; their tissue is nine patches of side / 4."""
    rows = ["image_id,data_provider,isup_grade,gleason_score"]
    for seed, (slide_id, provider, grade, score, quarters) in enumerate(TINY_SLIDES):
        mask = folder / "train_label_masks" / f"{slide_id}_mask.tiff"
        write_pyramid(folder / "train_images" / f"{slide_id}.tiff", draw_slide(seed, side), MPP[provider], tile=tile)
        write_pyramid(mask, draw_mask(quarters, side), MPP[provider], "lzw", tile)
        rows.append(f"{slide_id},{provider},{grade},{score}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_noise_patches(folder: Path, count: int, labels: tuple[str, str] = ("benign", "gleason3")) -> Path:
    """``count`` patches of noise, 64 pixels a side, in two label folders by turns."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / labels[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def _tiny_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_panda_folder(tmp_path_factory.mktemp("panda"))


@pytest.fixture
def tiny_slides(_tiny_slides: Path, tmp_path: Path) -> Callable[[], Path]:
    """``tiny_slides()`` gives a fresh copy, in tmp_path/panda, of six 1024-pixel slides of both providers in PANDA's layout."""

    def copy() -> Path:
        target = tmp_path / "panda"
        shutil.copytree(_tiny_slides, target)
        return target

    return copy


@pytest.fixture(scope="module")
def s3():
    """An S3 server with an empty bucket, known to this process and those that it starts by the environment."""
    from tests.s3_server import S3Server

    with pytest.MonkeyPatch.context() as environment, S3Server().serving() as server:
        known = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in (known | {"AWS_ENDPOINT_URL": server.url, "AWS_EC2_METADATA_DISABLED": "true"}).items():
            environment.setenv(name, value)
        yield server
