"""Command-line habits shared by the scripts: argument types, exit codes, signals that stop."""

from __future__ import annotations

import argparse
import io
import math
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from common.errors import UserError


class Parser(argparse.ArgumentParser):
    """The flags of a script, whose help begins with its own ``description`` as it stands. A bad one gets one sentence, exit code 2.

    The list of all flags, which argparse puts in front of that sentence, would push it off the screen.
    """

    def __init__(self, description: str, formatter_class: type = argparse.RawDescriptionHelpFormatter):
        super().__init__(description=description, formatter_class=formatter_class)

    def parse_args(self, args=None, namespace=None):
        """As argparse does; a URL where a path of this machine is wanted is refused, not taken for a folder named s3:."""
        values = super().parse_args(args, namespace)
        for name, value in vars(values).items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path) and re.match("[a-z][a-z0-9]*:/", str(path)):
                    self.error(f"--{name} takes a path of this machine, and {path} is of a URL; name a folder here")
        return values

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: error: {message} (--help explains the flags)\n")


def run(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave with its exit code: 0 done, 1 failed with one sentence, 130/143 by a signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; give another path, or free space and permissions there", file=sys.stderr)
        code = 1
    sys.exit(code or 0)


def network_address(text: str) -> str:
    """HOST:PORT, with tcp:// or the like in front or not."""
    if not re.fullmatch(r"((tcp|tls|ucx|wss?)://)?[^/\s]+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give it as tcp://HOST:8786")
    return text


def terminate_like_interrupt() -> None:
    """Let SIGTERM leave through the same clean-up as SIGINT, with exit code 143. For stages that hold no state in memory."""

    def stop(signum, frame):
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)


def _number(text: str, kind: type, accept: Callable[[float], bool], wanted: str):
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    if not math.isfinite(value) or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def patch_side(text: str) -> int:
    """Argument type: the side of a patch in pixels, 16 to 4096."""
    return _number(text, int, lambda value: 16 <= value <= 4096, "a whole number from 16 to 4096")


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def natural(text: str) -> int:
    """Argument type: a whole number of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """Argument type: a finite number above 0."""
    return _number(text, float, lambda value: value > 0, "a number above 0")


def non_negative_float(text: str) -> float:
    """Argument type: a finite number of at least 0."""
    return _number(text, float, lambda value: value >= 0, "a number of at least 0")


def fraction(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def picture_file(text: str) -> Path:
    """Argument type: a file that a picture can be written to, as PNG or JPEG by its ending."""
    return _named(text, "picture", (".png", ".jpg", ".jpeg"))


def film_file(text: str) -> Path:
    """Argument type: a file that ``common.film`` can write to."""
    return _named(text, "film", (".gif", ".mp4"))


def _named(text: str, what: str, endings: tuple[str, ...]) -> Path:
    if Path(text).suffix.lower() not in endings:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(endings)}; give the {what} one of these endings")
    return Path(text)


def existing_folder(path: Path, what: str, way_out: str) -> Path:
    """Return ``path`` when it is a folder; raise UserError naming ``what`` it should hold and the ``way_out`` otherwise."""
    if not path.exists():
        raise UserError(f"{what} not found: {path} does not exist; {way_out}")
    if not path.is_dir():
        raise UserError(f"{what} not found: {path} is a file, not a folder; {way_out}")
    return path
