"""Patches held on a device come as a DataLoader over their files gives them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.augment import Augmentation
from data.dataset import PatchDataset
from data.order import BalancedOrder, BatchesFrom
from data.resident import Resident, fits

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    draws = np.random.default_rng(0)
    for label, count in (("benign", 5), ("gleason4", 4)):
        (tmp_path / label).mkdir()
        for number in range(count):
            Image.fromarray(draws.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / label / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(flips=0.0, quarter_turns=1.0)])
def test_the_same_bits_as_from_files(folder, augmentation):
    dataset = PatchDataset(folder, 64, "label", augmentation=augmentation)

    def batches():
        return BatchesFrom(BalancedOrder(dataset.groups(), 3), 4, 8, 80, rank=1, world=2)

    expected = list(DataLoader(dataset, batch_sampler=batches()))
    found = list(Resident(dataset, batches(), CPU))
    assert len(found) == len(expected) == 18
    for (images, labels), (theirs, their_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, theirs) and torch.equal(labels, their_labels)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_only_what_fits_and_needs_no_more_than_symmetries_is_held(folder, monkeypatch):
    cuda, free = torch.device("cuda"), [9 * 64 * 64 * 3 * 4]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 0))
    dataset = PatchDataset(folder, 64, "label", augmentation=Augmentation())
    assert fits(dataset, cuda) and not fits(dataset, CPU)
    free[0] -= 4
    assert not fits(dataset, cuda)
    free[0] *= 2
    assert not fits(PatchDataset(folder, 64, "label", augmentation=Augmentation(noise=1.0)), cuda)
