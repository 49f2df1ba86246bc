"""The short form of benchmarks/kills.py: one kill at a random moment, the same result as without."""

import random

import pytest

from benchmarks.kills import stages, torment


@pytest.mark.parametrize("names", [["train"], pytest.param(["extract", "generate", "download"], marks=pytest.mark.slow)])
def test_a_killed_stage_ends_as_if_nothing_had_happened(tmp_path, names):
    for stage in stages(tmp_path, names, epochs=3):
        (tmp_path / stage.name).mkdir()
        killed, _, losses = torment(stage, tmp_path / stage.name, 1, random.Random(0))
        assert (killed, losses) == (1, 0), (tmp_path / stage.name / "killed0.log").read_text()
