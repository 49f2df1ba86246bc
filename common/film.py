"""Short films of images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from common.files import write_bytes


def write_film(path: Path, images: np.ndarray, rate: int) -> None:
    """(N, H, W, 3) uint8 with even H and W as .gif or .mp4, by the name's ending; ``rate`` frames a second. Its folder is made.

    Raises OSError; a file of that name is then as it was.
    """
    content = io.BytesIO()
    if path.suffix.lower() == ".gif":
        first, *rest = (Image.fromarray(image) for image in images)
        first.save(content, "GIF", save_all=True, append_images=rest, duration=1000 // rate, loop=0)
    else:
        _encode(content, images, rate)
    write_bytes(path, content.getvalue())


def _encode(content: BinaryIO, images: np.ndarray, rate: int) -> None:
    import av  # only films need it

    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
