"""CPU or CUDA: choosing, describing, measuring."""

from __future__ import annotations

import os
import resource
import shutil
import sys

import torch

from common.errors import UserError
from common.progress import say


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N`` -> device. Raises UserError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:0") from error
    if device.type not in {"cpu", "cuda"}:
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA device(s); use --device cpu or mend the driver"
        )
    return device


def check_speed_ups(device: torch.device, half: bool, compiled: bool) -> None:
    """Raise UserError where this machine cannot calculate in bfloat16, or not compile: before data is read, not after."""
    if half and device.type != "cuda":
        raise UserError("--precision bfloat16 is for CUDA: the improved model gains little or nothing by it on CPUs; leave it out")
    compiler = os.environ.get("CXX", "g++")
    if compiled and shutil.which(compiler) is None:
        raise UserError(f"--compile needs a C++ compiler and {compiler} is not installed; install it or leave --compile out")


def calculates_in_half(precision: str, device: torch.device) -> bool:
    """Whether a run of this precision calculates in bfloat16 here; said where it does not, as when gone on with on a CPU."""
    if precision != "bfloat16":
        return False
    if device.type != "cuda":
        say("note: the run was trained with --precision bfloat16, which is for CUDA, and goes on in float32 on this machine")
    return device.type == "cuda"


def describe(device: torch.device) -> str:
    """One phrase for the log: the card's name, or the number of CPU threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory_mb(device: torch.device) -> int:
    """Most memory held so far in MB: on the card for CUDA, by the process otherwise."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes / (1e6 if sys.platform == "darwin" else 1e3))
