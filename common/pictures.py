"""Pictures for people: grids of images with row captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
