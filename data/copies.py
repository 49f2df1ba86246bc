"""Copies on this machine of patches or shards on another file system, for the stages that read them again and again.

The first use copies everything, a later one what has changed there since. A journal beside each copy has a line a file that has
come whole, so that copying that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from common import storage
from common.errors import UserError
from common.files import inside, sha256
from common.progress import say, track
from common.seeding import derive_seed
from common.storage import Place, Remote
from data import shards

HOME = Path("datasets/.copies")
FILES_TOGETHER, BYTES_TOGETHER = 256, 2**30  # fetched at the same time


def at_hand(folder: Place) -> Path:
    """A folder of patches or shards on this machine: itself, or an up-to-date copy below HOME of one on another file system.

    Shards are compared with the checksums in their index. Processes that want the same copy wait for the one that makes it. Raises
    UserError where there are no patches, a shard is not what was packed, or the other file system does not answer.
    """
    if isinstance(folder, Path):
        return folder
    here = HOME / f"{folder.name}-{derive_seed(0, folder.url):x}"
    here.mkdir(parents=True, exist_ok=True)
    with FileLock(_beside(here, "lock")):
        there = storage.files_in(folder, below=True)
        if not there:
            raise UserError(
                f"no patches in {folder}; check its name, or run extract_patches.py with --output_dir or --shards there"
            )
        if shards.NAME not in there and any(name.endswith(".tar") for name in there):
            raise UserError(f"{folder} holds shards without their index; pack them again with extract_patches.py --shards")
        _bring_up_to_date(folder, there, here)
    return here


def _bring_up_to_date(folder: Remote, there: Mapping[str, Remote], here: Path) -> None:
    """Fetch what is new or changed, the index of shards first, and remove what is gone there."""
    journal = _beside(here, "jsonl")
    known = _read(journal)
    for name in known.keys() - there.keys():
        inside(here, name).unlink(missing_ok=True)
    wanted = [
        name
        for name, file in there.items()
        if known.get(name) != [file.size, file.version] or not _is_whole(inside(here, name), file.size)
    ]
    if not wanted:
        return
    wanted.sort(key=lambda name: name != shards.NAME)
    say(f"copying {len(wanted)} files ({sum(there[name].size for name in wanted) / 1e9:.1f} GB) of {folder} to {here}")
    with open(journal, "a", encoding="utf-8") as file:
        for name in track(_arriving(wanted, there, here), "copy", len(wanted), "files"):
            file.write(json.dumps([name, there[name].size, there[name].version]) + "\n")
            file.flush()


def _is_whole(path: Path, size: int) -> bool:
    """Whether a copy is there and as long as it should be: a lost power line may have left it empty."""
    return path.exists() and path.stat().st_size == size


def _arriving(wanted: list[str], there: Mapping[str, Remote], here: Path) -> Iterator[str]:
    """Fetch ``wanted``, some at a time; the name of each that has come whole."""
    for batch in _batches(wanted, there):
        storage.fetch({there[name]: inside(here, name) for name in batch})
        packed = shards.checksums(here) if shards.is_sharded(here) else {}
        for name in batch:
            if name in packed and sha256(here / name) != packed[name]:
                (here / name).unlink()
                raise UserError(
                    f"{there[name]} is not the shard that was packed: its checksum is wrong; pack them again, or copy it anew"
                )
            yield name


def _batches(names: list[str], there: Mapping[str, Remote]) -> Iterator[list[str]]:
    """The first alone, which may be the index that says what to expect of the others."""
    batch, size = [], BYTES_TOGETHER  # as good as full
    for name in names:
        if batch and (len(batch) == FILES_TOGETHER or size + there[name].size > BYTES_TOGETHER):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += there[name].size
    yield batch


def _read(journal: Path) -> dict[str, list]:
    """name -> [size, version] of the files that have come; lines that a crash cut short are left out."""
    known = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            name, *what = json.loads(line)
        except (ValueError, TypeError):
            continue
        known[name] = what
    return known


def _beside(here: Path, ending: str) -> Path:
    return here.with_name(f"{here.name}.{ending}")
