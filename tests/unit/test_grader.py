"""The judge of labels learns from real features and asks no more of generated ones than real ones show."""

import pytest
import torch

from models.grader import Grader

LABELS = torch.arange(64) % 2


def features(apart: float, labels: torch.Tensor = LABELS) -> list[torch.Tensor]:
    """Two maps' statistics, whose first number lies ``apart`` between the labels; large and far from 0, as real ones are."""
    first, second = torch.randn(len(labels), 3) * 5.0 + 40.0, torch.randn(len(labels), 2)
    first[:, 0] += 5.0 * apart * (labels - 0.5)
    return [first, second]


@pytest.fixture
def taught():
    torch.manual_seed(0)
    grader = Grader(5, 2)
    optimiser = torch.optim.Adam(grader.parameters(), lr=1e-2)
    for _ in range(500):
        optimiser.zero_grad()
        grader.learn(features(3.0), LABELS).backward()
        optimiser.step()
    return grader


def test_it_asks_for_labels_as_clear_as_real_ones_and_no_clearer(taught):
    none, less, as_real, more = (taught.unclear(features(apart), LABELS).item() for apart in (0.0, 1.5, 3.0, 9.0))
    assert none > less > as_real + 0.05
    assert as_real < 0.05 and more == 0.0


def test_wrong_labels_are_worse_than_none(taught):
    assert taught.unclear(features(3.0), 1 - LABELS) > taught.unclear(features(0.0), LABELS)


def test_its_gradient_makes_labels_clearer(taught):
    fake = features(0.0)
    fake[0].requires_grad_()
    taught.unclear(fake, LABELS).backward()
    push = -fake[0].grad[:, 0]
    assert push[LABELS == 1].mean() > 0 > push[LABELS == 0].mean()


def test_generated_images_teach_it_nothing(taught):
    before = {name: value.clone() for name, value in taught.state_dict().items()}
    taught.unclear(features(0.0), LABELS)
    assert all(torch.equal(value, taught.state_dict()[name]) for name, value in before.items())
