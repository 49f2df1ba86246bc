"""FID and KID against independent implementations, coverage against torch-fidelity's, and their edge cases."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from metrics.distances import coverage_metrics, distances, fid, kid, kth_distances


def features(count, shift=0.0, dims=24, seed=0):
    draws = np.random.default_rng(seed)
    return (draws.gamma(2.0, size=(count, dims)) * np.linspace(0.5, 2, dims) + shift).astype(np.float32)


def textbook_fid(a, b):
    product = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * product.real)


@pytest.mark.parametrize("counts", [(200, 150), (15, 150), (15, 12)])  # more and fewer images than dimensions
def test_fid_equals_the_definition_and_torch_fidelity(counts):
    a, b = features(counts[0]), features(counts[1], 0.3, seed=1)
    theirs = [fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in (a, b)]
    reference = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert fid(a, b) == pytest.approx(reference, rel=1e-4)
    if min(counts) > a.shape[1]:
        assert fid(a, b) == pytest.approx(textbook_fid(a.astype(np.float64), b.astype(np.float64)), rel=1e-6)


def test_fid_of_two_gaussians_is_their_frechet_distance():
    # Diagonal covariances: the squared difference of means plus that of the standard deviations.
    draws = np.random.default_rng(0).standard_normal((200_000, 2))
    assert fid(draws[:100_000], draws[100_000:] * [1, 3] + [2, 0]) == pytest.approx(4 + 4, rel=0.02)


def test_fid_of_a_set_with_itself_is_zero():
    assert fid(features(50), features(50)) == pytest.approx(0, abs=1e-6)


def test_kid_equals_torch_fidelity_on_one_subset_of_everything():
    a, b = features(80), features(80, 0.3, seed=1)
    options = {"kid_subsets": 1, "kid_subset_size": 80, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    options |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}
    tensors = (torch.from_numpy(x.astype(np.float64)) for x in (a, b))
    assert kid(a, b)[0] == pytest.approx(kid_features_to_metric(*tensors, **options)["kernel_inception_distance_mean"], rel=1e-6)


def direct_kid(a, b):
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def between_different(x):
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return between_different(a) + between_different(b) - 2 * kernel(a, b).mean()


def test_kid_and_its_error_equal_leaving_out_one_group_at_a_time():
    a, b = features(30).astype(np.float64), features(20, 0.2, seed=1).astype(np.float64)
    groups = np.array(["x", "y", "z"])[np.arange(30) % 3]
    left_real = np.array([direct_kid(a[groups != name], b) for name in "xyz"])
    made = np.array(["u", "v", "w", "x", "y"])[np.arange(20) % 5]
    by_image = np.array([direct_kid(a, np.delete(b, index, 0)) for index in range(20)])
    by_slide = np.array([direct_kid(a, b[made != name]) for name in "uvwxy"])
    for fake_groups, left_fake in ((None, by_image), (made, by_slide)):
        variance = sum((len(x) - 1) / len(x) * ((x - x.mean()) ** 2).sum() for x in (left_real, left_fake))
        value, error = kid(a, b, groups, fake_groups)
        assert value == pytest.approx(direct_kid(a, b))
        assert error == pytest.approx(np.sqrt(variance))


def test_the_error_of_kid_is_that_of_repeated_draws():
    draws = [kid(features(100, seed=2 * k), features(100, 0.1, seed=2 * k + 1)) for k in range(60)]
    spread = np.std([value for value, _ in draws])
    assert np.mean([error for _, error in draws]) == pytest.approx(spread, rel=0.35)


def of_slides(slides, seed, shift=0.0):
    """Twelve images of each slide, which have much in common, and their slides."""
    draws = np.random.default_rng(seed)
    common = draws.normal(shift, 0.5, (slides, 1, 8))
    return (common + draws.normal(0, 1, (slides, 12, 8))).reshape(-1, 8), np.repeat(np.arange(slides), 12)


@pytest.mark.parametrize("slides", [(30, 6), (6, 30)])
def test_the_error_of_kid_knows_the_slides_of_both_sides(slides):
    found, by_image = [], []
    for k in range(60):
        (a, real), (b, fake) = of_slides(slides[0], 2 * k), of_slides(slides[1], 2 * k + 1, 0.5)
        found.append(kid(a, b, real, fake))
        by_image.append(kid(a, b)[1])
    spread = np.std([value for value, _ in found])
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.35)
    assert np.mean(by_image) < 0.7 * spread


def test_precision_and_recall_equal_torch_fidelity():
    real, fake = features(60), features(60, 0.4, seed=1)
    precision, recall = calculate_precision_recall_full(torch.from_numpy(fake), torch.from_numpy(real))
    ours = coverage_metrics(real, fake)
    assert (ours["precision"], ours["recall"]) == pytest.approx((precision, recall))


def test_density_and_coverage_equal_counting():
    real, fake = features(40), features(50, 0.2, seed=1)
    apart = np.linalg.norm(real[:, None] - real[None], axis=2)
    radius = np.sort(apart, axis=1)[:, 5]  # each is its own nearest
    inside = np.linalg.norm(real[:, None] - fake[None], axis=2) <= radius[:, None]
    found = coverage_metrics(real, fake)
    assert found["density"] == pytest.approx(inside.sum() / (5 * 50))
    assert found["coverage"] == pytest.approx(inside.any(1).mean())


def test_many_images_are_measured_part_by_part_with_the_same_result(monkeypatch):
    a, b, slides = features(60), features(50, 0.2, seed=1), np.arange(60) % 7
    measures = (
        lambda: kid(a, b),
        lambda: kid(a, b, slides),
        lambda: tuple(coverage_metrics(a, b).values()),
        lambda: kth_distances(a, 4),
    )
    at_once = [measure() for measure in measures]
    monkeypatch.setattr("metrics.distances._ROWS", 16)
    for measure, expected in zip(measures, at_once, strict=True):
        assert measure() == pytest.approx(expected)


def test_coverage_metrics_tell_collapse_from_nonsense():
    real = features(200)
    collapsed = coverage_metrics(real, np.repeat(real[:1], 200, 0) + 1e-3)
    assert collapsed["precision"] == 1 and collapsed["coverage"] < 0.2 and collapsed["recall"] < 0.2
    nonsense = coverage_metrics(real, features(200, 100))
    assert nonsense == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_distances_of_equal_vectors_are_zero():
    a = features(40, 50)
    assert np.diag(distances(a, a)) == pytest.approx(0, abs=1e-4)


def test_kth_distance_with_fewer_neighbours_than_asked_is_the_farthest():
    assert kth_distances(np.array([[0.0], [1], [3]]), 5) == pytest.approx([3, 2, 3])


def test_slides_that_leave_too_few_behind_are_not_left_out_in_turn():
    a, b = features(30), features(20, 0.2, seed=1)
    sizes = np.array(["large"] * 28 + ["small"] * 1 + ["other"] * 1)
    left = np.array([direct_kid(a[sizes != name], b) for name in ("large", "other", "small")])
    fake = np.array([direct_kid(a, np.delete(b, index, 0)) for index in range(20)])
    variance = sum((len(x) - 1) / len(x) * ((x - x.mean()) ** 2).sum() for x in (left, fake))
    assert kid(a, b, sizes)[1] == pytest.approx(np.sqrt(variance), rel=1e-5)
    two = np.array(["large"] * 29 + ["small"])
    assert kid(a, b, two) == kid(a, b)
    assert np.isfinite(kid(a, b, np.array(["same"] * 30))[1])
