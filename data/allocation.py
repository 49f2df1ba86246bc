"""How many patches each slide gives: the wanted number, spread as evenly as the tissue allows. Pure arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Supply:
    """What one slide can give. cell: what is balanced over, such as (provider, grade). labelled, unlabelled: patches at most.
    taken: patches that are cut already and stay."""

    cell: Hashable
    labelled: int
    unlabelled: int
    taken: int = 0

    @property
    def total(self) -> int:
        return self.labelled + self.unlabelled


def water_fill(total: int, caps: Sequence[int], floors: Sequence[int] | None = None) -> list[int]:
    """Spread ``total`` over places as evenly as ``caps`` (at most) and ``floors`` (at least) allow.

    The sum is ``total``, or the sum of the caps where that is less, or of the floors where that is more. Places between their
    bounds differ by one at most, the earlier ones being larger.
    """
    floors = [0] * len(caps) if floors is None else floors
    low, high = 0, max(caps, default=0)
    while low < high:  # the highest level whose filling does not exceed the total
        level = (low + high + 1) // 2
        filled = sum(min(max(level, floor), cap) for cap, floor in zip(caps, floors, strict=True))
        low, high = (level, high) if filled <= total else (low, level - 1)
    shares = [min(max(low, floor), cap) for cap, floor in zip(caps, floors, strict=True)]
    rest = total - sum(shares)
    for i, cap in enumerate(caps):
        if rest > 0 and shares[i] == low < cap:
            shares[i] += 1
            rest -= 1
    return shares


def allocate(total: int, supplies: Sequence[Supply]) -> list[int]:
    """Patches from each slide, ``total`` together where there is enough: even over cells, then over the slides of a cell.

    Within a cell, patches with a label go before patches without one.
    """
    members = defaultdict(list)
    for index, supply in enumerate(supplies):
        members[supply.cell].append(index)
    caps = [sum(supplies[i].total for i in group) for group in members.values()]
    floors = [sum(supplies[i].taken for i in group) for group in members.values()]
    shares = [0] * len(supplies)
    for quota, group in zip(water_fill(total, caps, floors), members.values(), strict=True):
        for index, share in zip(group, _within(quota, [supplies[i] for i in group]), strict=True):
            shares[index] = share
    return shares


def _within(quota: int, group: list[Supply]) -> list[int]:
    taken_labelled = [min(supply.taken, supply.labelled) for supply in group]
    rest_taken = [supply.taken - taken for supply, taken in zip(group, taken_labelled, strict=True)]
    labelled = water_fill(quota - sum(rest_taken), [supply.labelled for supply in group], taken_labelled)
    rest = water_fill(quota - sum(labelled), [supply.unlabelled for supply in group], rest_taken)
    return [a + b for a, b in zip(labelled, rest, strict=True)]
