"""Short films of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_film(path: Path, images: np.ndarray, rate: int) -> None:
    """(N, H, W, 3) uint8 with even H and W as .gif or .mp4, by the name's ending; ``rate`` frames a second. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gif":
        first, *rest = (Image.fromarray(image) for image in images)
        first.save(path, save_all=True, append_images=rest, duration=1000 // rate, loop=0)
        return
    import av  # only films need it

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
