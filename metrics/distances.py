"""Distances between two sets of feature vectors: pure functions, features in, numbers out.

Throughout, ``real`` is (M, D) and ``fake`` is (N, D), float arrays of one feature space.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

UNBIASED_FID = 2048  # images: below it FID's bias outweighs what it measures
_ROWS = 1024  # of a kernel or distance matrix at a time


def fid(real: np.ndarray, fake: np.ndarray) -> float:
    """Frechet inception distance (Heusel et al. 2017) of at least two vectors on each side.

    The trace of the square root of the product of both covariances is the sum of the singular values of the product of the
    centred features. That is exact, needs no square root of a 2048x2048 matrix, and is quick for the small sets of one label.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    shift = real.mean(0) - fake.mean(0)
    a, b = _whitened(real), _whitened(fake)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(shift @ shift + (a**2).sum() + (b**2).sum() - 2 * cross, 0.0))


def _whitened(features: np.ndarray) -> np.ndarray:
    """A with A^T A the covariance of the features, and at most D rows."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred


def kid(
    real: np.ndarray, fake: np.ndarray, real_groups: np.ndarray | None = None, fake_groups: np.ndarray | None = None
) -> tuple[float, float]:
    """Kernel inception distance and its standard error (Binkowski et al., "Demystifying MMD GANs", 2018).

    The unbiased estimate over all images instead of a mean over random subsets. The error is the delete-one jackknife's, the
    variances of both sides added; with ``real_groups`` (M,) or ``fake_groups`` (N,), the slide of each image, whole slides of that
    side are left out in turn: patches of one slide are not independent, and an error that ignores it is too small. Where fewer than
    two slides of a side leave others behind, single images are left out. With few slides the error is rather too large (a jackknife
    overestimates on average: Efron and Stein, "The jackknife estimate of variance", 1981).
    """
    value, *errors = kid_by_side(real, fake, real_groups, fake_groups)
    return value, float(np.hypot(*errors))


def kid_by_side(
    real: np.ndarray, fake: np.ndarray, real_groups: np.ndarray | None = None, fake_groups: np.ndarray | None = None
) -> tuple[float, float, float]:
    """As ``kid``, with the errors by the draw of ``real`` and of ``fake`` apart: two scores against the same real images differ by
    the second alone.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    within_real, within_fake = _KernelSums(real, real_groups), _KernelSums(fake, fake_groups)
    across = _cross_sums(real, fake)
    value = within_real.mean + within_fake.mean - 2 * across[0].mean() / len(fake)
    real_side = within_real.without() - 2 * _mean_without(across[0], within_real, len(fake))
    fake_side = within_fake.without() - 2 * _mean_without(across[1], within_fake, len(real))
    return float(value), *(float(np.sqrt(_jackknife_variance(side))) for side in (real_side, fake_side))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _leaving_two(sizes: np.ndarray) -> np.ndarray:
    """(G,) bool: without this group at least two members are left, the fewest that have a mean over pairs."""
    return sizes.sum() - sizes >= 2


def by_group(groups: np.ndarray) -> bool:
    """Whether ``kid``'s error can come from leaving out whole groups (N,): at least two of them leave two members."""
    return _leaving_two(np.unique(groups, return_counts=True)[1]).sum() >= 2


class _KernelSums:
    """Sums of the kernel between different members of one set: all, by row, and inside each group; each member is its own where
    fewer than two groups can be left out.
    """

    def __init__(self, features: np.ndarray, groups: np.ndarray | None):
        alone = groups is None or not by_group(groups)
        self.groups = np.arange(len(features)) if alone else np.unique(groups, return_inverse=True)[1]
        rows, inside = np.empty(len(features)), np.empty(len(features))
        for part in _parts(len(features)):
            block = _kernel(features[part], features)
            block[np.arange(len(block)), np.arange(part.start, part.stop)] = 0
            rows[part] = block.sum(1)
            inside[part] = (block * (self.groups[part, None] == self.groups)).sum(1)
        self.total = rows.sum()
        self.removed = np.bincount(self.groups, 2 * rows - inside)
        self.sizes = np.bincount(self.groups)
        self.mean = self.total / (len(features) * (len(features) - 1))

    def without(self) -> np.ndarray:
        """The mean over pairs when each group in turn is left out, (G,) less those that leave too few."""
        kept = _leaving_two(self.sizes)
        left = (len(self.groups) - self.sizes)[kept]
        return (self.total - self.removed[kept]) / (left * (left - 1))


def _cross_sums(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.empty(len(real)), np.zeros(len(fake))
    for part in _parts(len(real)):
        block = _kernel(real[part], fake)
        rows[part] = block.sum(1)
        columns += block.sum(0)
    return rows, columns


def _mean_without(sums: np.ndarray, within: _KernelSums, others: int) -> np.ndarray:
    kept = _leaving_two(within.sizes)
    return (sums.sum() - np.bincount(within.groups, sums)[kept]) / ((len(sums) - within.sizes[kept]) * others)


def _jackknife_variance(estimates: np.ndarray) -> float:
    count = len(estimates)
    return float((count - 1) / count * ((estimates - estimates.mean()) ** 2).sum())


def coverage_metrics(real: np.ndarray, fake: np.ndarray, neighbours: int = 3, density_neighbours: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, k = 3), density and coverage (Naeem et al. 2020, k = 5).

    All four depend on how many images there are: compare only sets of one size. Precision: share of fakes inside a real image's
    k-nearest ball; recall: the reverse; density: real balls around a fake over k (about 1 when alike); coverage: share of real
    images whose ball holds a fake.
    """
    real_ball, fake_ball = kth_distances(real, neighbours), kth_distances(fake, neighbours)
    dense_ball = kth_distances(real, density_neighbours)
    precise, recalled = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    density, covered = 0, np.zeros(len(real), bool)
    for part in _parts(len(real)):
        distance = distances(real[part], fake)
        precise |= (distance <= real_ball[part, None]).any(0)
        recalled[part] = (distance <= fake_ball).any(1)
        inside = distance <= dense_ball[part, None]
        density += inside.sum()
        covered[part] = inside.any(1)
    names = ("precision", "recall", "density", "coverage")
    values = (precise.mean(), recalled.mean(), density / (density_neighbours * len(fake)), covered.mean())
    return dict(zip(names, map(float, values), strict=True))


def kth_distances(features: np.ndarray, k: int) -> np.ndarray:
    """Distance of each vector to its k-th nearest other one, (N,); to the farthest when there are fewer than k others."""
    k = min(k, len(features) - 1)
    return np.concatenate([np.partition(distances(features[part], features), k, axis=1)[:, k] for part in _parts(len(features))])


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between all rows of ``a`` and all of ``b``, float64: in float32 copies would not lie at zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))
