"""Where a run writes: train.log for people, metrics.jsonl for programs, sample pictures, TensorBoard on request."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.files import replacing, write_all
from common.pictures import png
from common.progress import overheard, say, show
from training import processes
from training.lock import OccupiedError

LOG, METRICS = "train.log", "metrics.jsonl"


def read_metrics(path: Path) -> tuple[list[dict], bool]:
    """Rows of a metrics.jsonl and whether its last line was half written (it is then left out).

    Raises UserError when a line in the middle is damaged.
    """
    if not path.exists():
        return [], False
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number} is damaged; move the file away and go on") from error
    return rows, bool(lines[-1])


class RunLog:
    """The log folder of one run. Every line is on the disk at once; a full disk costs lines, never the training."""

    def __init__(self, folder: Path, tensorboard: bool = False):
        self.folder = folder
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only on request

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def rewind(self, images: int, epoch: float) -> None:
        """Before resuming at ``images`` seen, ``epoch`` epochs: set aside what lies beyond, drop a half-written line.

        Rows go to metrics.superseded.jsonl, pictures get the name superseded_epoch_0020.png.
        """
        for path in (self.folder / "samples").glob("epoch_*.png"):
            if (match := re.fullmatch(r"epoch_(\d+)\.png", path.name)) and int(match[1]) > round(epoch):
                path.replace(path.with_name(f"superseded_{path.name}"))
        path = self.folder / METRICS
        rows, torn = read_metrics(path)
        beyond = [row for row in rows if row.get("images", 0) > images]
        if torn:
            self.line("warning: the last line of metrics.jsonl was half written and is dropped")
        if not beyond and not torn:
            return
        with open(self.folder / "metrics.superseded.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in beyond)
        with replacing(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row.get("images", 0) <= images)

    def line(self, text: str) -> None:
        """One timestamped line to train.log and to stdout."""
        log_line(self.folder, text)

    def metrics(self, row: dict, images: int) -> None:
        """Append numbers to metrics.jsonl (and TensorBoard, over images seen). NaN and infinity become null, valid JSON."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        _append(self.folder / METRICS, json.dumps({"images": images} | finite))
        for key, value in finite.items():
            if isinstance(value, int | float):
                self._on_board(lambda board, key=key, value=value: board.add_scalar(key, value, images))
        self._on_board(lambda board: board.flush())

    def picture(self, name: str, image: Image.Image, images: int) -> None:
        """Keep an RGB image as samples/NAME. Pillow's own encoder would take as long for a grid as the generator does."""
        path = self.folder / "samples" / name
        try:
            with replacing(path, durable=False) as file:
                file.write(png(np.asarray(image)))
        except OSError as error:
            say(f"warning: {path} could not be written ({error}); training goes on")
        self._on_board(lambda board: board.add_image("samples", np.asarray(image), images, dataformats="HWC"))

    def close(self) -> None:
        """Flush TensorBoard."""
        self._on_board(lambda board: board.close())

    def _on_board(self, write: Callable) -> None:
        """Write to TensorBoard's files where they were asked for; where that fails, the run goes on without them."""
        if self._board is None:
            return
        try:
            write(self._board)
        except OSError as error:
            self._board = None
            say(f"warning: TensorBoard's files could not be written ({error}); training goes on without them")


class SilentLog:
    """The log of a process that leaves writing to another one."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getattr__(self, name: str):
        return lambda *_: None


class Notes:
    """What is said beside the log, for runs whose output nobody sees: kept until the log is open, then written into it.

    written: whether it ever is.
    """

    def __init__(self, folder: Path, written: bool):
        self._folder, self._written, self._open = folder, written, False
        self._kept: list[str] = []

    def hear(self, text: str) -> None:
        """One line that was said."""
        self._kept.append(_stamped(text))
        if self._open:
            self.open()

    def refused(self, error: UserError) -> None:
        """Keep nothing else: it is of no use to those who read the log of the run that is there."""
        self._kept = [_stamped(f"note: another run was refused: {error}")]

    def open(self) -> None:
        """Write what was kept, with the times when it was said, and go on with what is said from now on."""
        self._open = self._written
        if self._written and self._kept:
            with suppress(OSError):  # the lines say where they could not be written
                self._folder.mkdir(parents=True, exist_ok=True)
            for line in self._kept:
                _append(self._folder / LOG, line)
        self._kept = []


@contextmanager
def noted(folder: Path, written: bool) -> Iterator[Notes]:
    """Notes for as long as a run lasts; the error that ends it is the last of them. written: unless another process writes."""
    notes = Notes(folder, written and processes.writes())
    with overheard(notes.hear):
        try:
            yield notes
        except OccupiedError as error:  # the log may be that of a run that is well
            notes.refused(error)
            raise
        except Exception as error:
            notes.hear(f"error: {error}" if isinstance(error, UserError) else f"error: {type(error).__name__}: {error}")
            raise
        finally:
            notes.open()


def log_line(folder: Path, text: str) -> None:
    """One timestamped line to FOLDER/train.log and to stdout, from whichever process."""
    stamped = _stamped(text)
    show(stamped)
    _append(folder / LOG, stamped)


def _stamped(text: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"


def _append(path: Path, line: str) -> None:
    """Add a line to a file, all of it or nothing: half a line before the next one would make both unreadable."""
    try:
        with open(path, "ab", buffering=0) as file:
            start = file.tell()
            try:
                write_all(file, (line + "\n").encode())
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        show(f"warning: {path} could not be written ({error}); training goes on")


def duration(seconds: float) -> str:
    """Seconds as 1d02h, 3h05m, 4m10s or 12s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
