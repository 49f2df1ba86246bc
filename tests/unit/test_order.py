"""The data order: balanced, without end, and a pure function of (seed, position)."""

from collections import Counter

import numpy as np
import pytest

from data.order import MOST_REPEATS, BalancedOrder, BatchesFrom, balanced_shares


def test_shares_are_equal_where_nothing_is_rare():
    assert balanced_shares([30, 40, 50]) == pytest.approx([1 / 3] * 3)


def test_a_rare_group_is_capped_and_the_rest_share_evenly():
    shares = balanced_shares([1, 500, 499])
    assert shares[0] == pytest.approx(MOST_REPEATS / 1000)
    assert shares[1] == pytest.approx(shares[2])
    assert shares.sum() == pytest.approx(1)


def test_shares_sum_to_one_for_any_sizes():
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = random.integers(1, 1000, size=random.integers(1, 12))
        shares = balanced_shares(sizes)
        assert shares.sum() == pytest.approx(1)
        assert (shares <= MOST_REPEATS * sizes / sizes.sum() + 1e-9).all() or len(sizes) == 1


def test_an_epoch_balances_groups_and_repeats_no_patch_needlessly():
    groups = ["a"] * 60 + ["b"] * 30 + ["c"] * 30
    order = BalancedOrder(groups, seed=1)
    epoch = [order(position) for position in range(120)]
    assert Counter(groups[index] for index in epoch) == {"a": 40, "b": 40, "c": 40}
    assert len(set(epoch) & set(range(60))) == 40  # the large group gives 40 different patches
    assert max(Counter(epoch).values()) == 2  # the small ones give each patch once or twice


def test_over_epochs_every_patch_of_a_group_comes_equally_often():
    order = BalancedOrder(["a"] * 60 + ["b"] * 30 + ["c"] * 30, seed=1)
    counts = Counter(order(position) for position in range(3 * 120))  # 120 draws of "a", 60 patches
    assert {counts[index] for index in range(60)} == {2}
    assert {counts[index] for index in range(60, 120)} == {4}


def test_order_depends_on_seed_and_position_alone():
    groups = [index % 3 for index in range(50)]
    one, other = BalancedOrder(groups, seed=5), BalancedOrder(groups, seed=5)
    forward = [one(position) for position in range(300)]
    assert [other(position) for position in reversed(range(300))] == forward[::-1]
    assert [BalancedOrder(groups, seed=6)(position) for position in range(300)] != forward


def test_batches_go_on_where_they_were_left():
    order = BalancedOrder([0] * 10, seed=0)
    whole = [draw for batch in BatchesFrom(order, 4, 0, 40) for draw in batch]
    rest = [draw for batch in BatchesFrom(order, 4, 16, 40) for draw in batch]
    assert whole[16:] == rest
    assert len({draw.seed for draw in whole}) == len(whole)
    assert [len(batch) for batch in BatchesFrom(order, 4, 0, 10)] == [4, 4, 4]
    assert len(BatchesFrom(order, 4, 0, 10)) == 3
