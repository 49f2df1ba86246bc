"""Pictures for people: grids of images with row captions."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from isal import isal_zlib
from PIL import Image, ImageDraw, ImageFont

from common.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

# What damaged or hostile image files make Pillow raise (found by flipping bits and cutting files).
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, OverflowError, struct.error, zlib.error)
UNDECODABLE = (*DAMAGED, Image.DecompressionBombError)
GAP = 2
CAPTION_HEIGHT = 18


def grid(images: np.ndarray, columns: int, captions: Sequence[str] = ()) -> Image.Image:
    """Lay (N, H, W, 3) uint8 images out row by row on white; ``captions`` stand above the rows, one a row, where given."""
    count, height, width = images.shape[:3]
    rows = -(-count // columns)
    top = CAPTION_HEIGHT if captions else 0
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP + top) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        y = row * (height + GAP + top) + GAP
        if column == 0 and row < len(captions):
            draw.text((GAP + 2, y + 1), captions[row], fill=(40, 40, 40), font=font)
        sheet.paste(Image.fromarray(image), (column * (width + GAP) + GAP, y + top))
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture where a user asked for it, in the format of the name's ending; its folder is made. Raises OSError."""
    content = io.BytesIO()
    picture.save(content, Image.registered_extensions()[path.suffix.lower()])
    write_bytes(path, content.getvalue())


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8 on the CPU."""
    scaled = images.float().add(1).mul_(127.5).round_().clamp_(0, 255)  # the first makes a copy, the others need none
    return scaled.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def png(rgb: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> PNG: filter "up" (ISO/IEC 15948, 9.2), deflated by Intel's igzip, made for speed."""
    height, width, _ = rgb.shape
    rows = rgb.reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0], filtered[0, 1:] = 2, rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = isal_zlib.compress(filtered, 1)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(body)), kind, body, struct.pack(">I", isal_zlib.crc32(body, isal_zlib.crc32(kind)))))
