"""Every case of the corpus of bad input ends in a sentence or a counted skip, with everything that was there as it was."""

import pytest

from tests.corpus import cases, run_case


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_bad_input(case, tmp_path):
    outcome = run_case(case, tmp_path)
    assert not outcome.problems, outcome.printed


def test_the_corpus_is_large_and_names_its_cases_once():
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) >= 60
