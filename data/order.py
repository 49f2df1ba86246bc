"""The order of the training data: balanced over groups, and a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from common.seeding import derive_seed

# A small group is shown at most this many times as often as without balancing: more would teach its few patches by heart.
MOST_REPEATS = 4.0


class Draw(NamedTuple):
    """One place in the order: which patch, and the seed of its augmentation."""

    index: int
    seed: int


def balanced_shares(sizes: Sequence[int]) -> np.ndarray:
    """Share of the draws for each group of ``sizes`` patches: equal, none above MOST_REPEATS times its natural share."""
    natural = np.asarray(sizes, dtype=np.float64) / sum(sizes)
    limits = natural * MOST_REPEATS
    shares = np.zeros_like(natural)
    open_groups = np.ones(len(natural), dtype=bool)
    while open_groups.any():
        equal = (1.0 - shares[~open_groups].sum()) / open_groups.sum()
        capped = open_groups & (limits < equal)
        if not capped.any():
            shares[open_groups] = equal
            break
        shares[capped] = limits[capped]
        open_groups &= ~capped
    return shares / shares.sum()


class BalancedOrder:
    """Position -> patch index, without end.

    groups: one key a patch, such as (grade, provider). An epoch is as many draws as there are patches. Each group walks through
    shuffles of its patches and gives each epoch its next few, so that over the epochs all its patches come equally often.
    """

    def __init__(self, groups: Sequence[Hashable], seed: int):
        if not groups:
            raise ValueError("no patches to order")
        self.length, self.seed = len(groups), seed
        keys = sorted(set(groups), key=repr)
        number = {key: rank for rank, key in enumerate(keys)}
        codes = np.array([number[key] for key in groups])
        self._members = [np.flatnonzero(codes == rank) for rank in range(len(keys))]
        exact = balanced_shares([len(members) for members in self._members]) * self.length
        self._quota = np.floor(exact).astype(int)
        # Largest remainders get the draws that rounding down left over.
        for rank in np.argsort(self._quota - exact, kind="stable")[: self.length - self._quota.sum()]:
            self._quota[rank] += 1
        self._epoch: int | None = None
        self._indices = np.empty(0, dtype=int)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._indices = epoch, self._one_epoch(epoch)
        return int(self._indices[place])

    def _one_epoch(self, epoch: int) -> np.ndarray:
        parts = [self._stream(rank, epoch * quota, quota) for rank, quota in enumerate(self._quota) if quota]
        return np.random.default_rng(derive_seed(self.seed, "epoch", epoch)).permutation(np.concatenate(parts))

    def _stream(self, rank: int, start: int, count: int) -> np.ndarray:
        """``count`` members of a group from place ``start`` of its endless chain of shuffles."""
        members = self._members[rank]
        first, last = start // len(members), (start + count - 1) // len(members)
        chain = [
            np.random.default_rng(derive_seed(self.seed, f"group {rank}", block)).permutation(members)
            for block in range(first, last + 1)
        ]
        offset = start - first * len(members)
        return np.concatenate(chain)[offset : offset + count]


class BatchesFrom(Sampler[list[Draw]]):
    """Batches of an order from ``start`` images seen up to ``stop``; the last one is as large as the others.

    rank, world: of each batch every ``world``-th draw from ``rank`` on, one process's share.
    """

    def __init__(self, order: BalancedOrder, batch_size: int, start: int, stop: int, rank: int = 0, world: int = 1):
        self.order, self.batch_size, self.start, self.stop = order, batch_size, start, stop
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(0, -(-(self.stop - self.start) // self.batch_size))

    def __iter__(self) -> Iterator[list[Draw]]:
        for first in range(self.start, self.stop, self.batch_size):
            positions = range(first + self.rank, first + self.batch_size, self.world)
            yield [Draw(self.order(position), derive_seed(self.order.seed, "augment", position)) for position in positions]
