"""Coverage-guided fuzzing of what reads other people's files: train.csv, patches.csv, checkpoints.

    pip install atheris
    python benchmarks/fuzz.py csv -max_total_time=600            or: manifest, checkpoint; further flags are libFuzzer's

A reader may return or raise UserError. Anything else ends the run, its input in a file crash-... of the current folder. Half of
the inputs for checkpoints become the pickle inside a sound zip: random bytes never get past the checksums of a zip.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import atheris
except ModuleNotFoundError:
    sys.exit("error: atheris is not installed; pip install atheris, then start again")

with atheris.instrument_imports(include=["csv", "data", "training.checkpoint", "models.config", "torch._weights_only_unpickler"]):
    from common.errors import UserError
    from data.manifest import COLUMNS, NAME, read_manifest
    from data.panda import TRAIN_CSV_COLUMNS, read_train_csv
    from models.config import ModelConfig
    from training import checkpoint

FOLDER = Path(tempfile.mkdtemp())


def read_csv(data: bytes) -> None:
    """Even first bytes stand for a sound header, so that rows are reached."""
    header = (",".join(TRAIN_CSV_COLUMNS) + "\n").encode() if data[:1] and data[0] % 2 == 0 else b""
    (FOLDER / "train.csv").write_bytes(header + data[1:])
    read_train_csv(FOLDER / "train.csv")


def read_rows(data: bytes) -> None:
    header = (",".join(COLUMNS) + "\n").encode() if data[:1] and data[0] % 2 == 0 else b""
    (FOLDER / NAME).write_bytes(header + data[1:])
    for patch in read_manifest(FOLDER):
        if not (FOLDER / patch.path).resolve().is_relative_to(FOLDER.resolve()):
            raise AssertionError(f"{patch.path!r} leaves the folder")


def read_checkpoint(data: bytes) -> None:
    path = FOLDER / "x.pt"
    if data[:1] and data[0] % 2 == 0:
        with zipfile.ZipFile(path, "w") as archive:
            for name, body in (("data.pkl", data[1:]), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", bytes(64))):
                archive.writestr(f"x/{name}", body)
    else:
        path.write_bytes(data[1:])
    state = checkpoint.load(path)
    if isinstance(state.get("model"), dict):
        ModelConfig.from_dict(state["model"])


READERS: dict[str, Callable[[bytes], None]] = {"csv": read_csv, "manifest": read_rows, "checkpoint": read_checkpoint}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        raise SystemExit(f"name a reader: {', '.join(READERS)}")
    reader = READERS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with contextlib.suppress(UserError):
            reader(data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
