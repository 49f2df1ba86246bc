"""What a machine can do is asked before the data is read."""

import pytest
import torch

from common.errors import UserError
from training.device import calculates_in_half, check_speed_ups

CPU = torch.device("cpu")


def test_cpus_are_not_slowed_down_by_half_precision():
    with pytest.raises(UserError, match="--precision bfloat16 is for CUDA"):
        check_speed_ups(CPU, half=True, compiled=False)


def test_a_run_in_half_precision_goes_on_in_whole_on_a_cpu(capsys):
    assert not calculates_in_half("bfloat16", CPU) and "goes on in float32" in capsys.readouterr().out
    assert not calculates_in_half("float32", CPU) and capsys.readouterr().out == ""
    assert calculates_in_half("bfloat16", torch.device("cuda")) and capsys.readouterr().out == ""


def test_compiling_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not installed; install it or leave --compile out"):
        check_speed_ups(CPU, half=False, compiled=True)


def test_plain_training_is_possible_anywhere(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_speed_ups(CPU, half=False, compiled=False)
