"""Patches packed into tar files (shards): a thousand large files in place of millions of small ones.

``train-000000.tar``, ``test-000000.tar`` ... hold two members a patch in WebDataset's convention (webdataset.github.io/webdataset),
``000000042.png`` and ``000000042.json`` with its manifest row, in a shuffled order, so that programs that read from front to
back see a mixture. ``patches.parquet`` beside them holds the same rows and where in which shard each picture lies: with it any
patch is read alone, and training from shards sees the very order, and makes the very bits, of training from files.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common import storage
from common.errors import UserError
from common.files import inside, remove_leftovers, replacing, sha256
from common.progress import track
from common.seeding import derive_seed
from common.storage import Place, Remote
from data import manifest
from data.manifest import COLUMNS, SPLITS, Patch
from data.panda import LABELS

NAME = "patches.parquet"
SHARD_BYTES = 256 * 2**20
FETCHED_TOGETHER = 256  # patches that are packed from another file system
_SHARD = re.compile(r"(train|test)-\d{6}\.tar")
_TYPES = {
    "isup_grade": "int8",
    "x": "int64",
    "y": "int64",
    "level": "int32",
    "mpp": "double",
    "tissue": "double",
    "sharpness": "double",
}
_PLACE = {"shard": "string", "key": "string", "offset": "int64", "size": "int64"}
_AGAIN = "pack them again with extract_patches.py --shards"


def is_sharded(folder: Path) -> bool:
    """Whether a folder holds shards and their index."""
    return (Path(folder) / NAME).exists()


def _arrow():
    """pyarrow and its Parquet half; imported here since only shards need them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"shards need {error.name}; install it with pip install -r requirements-scale.txt") from error
    return pyarrow, pyarrow.parquet


# ----------------------------------------------------------------------------------------------------------------- writing


def check_target(folder: Place, target: Place) -> None:
    """Raise UserError where shards in ``target`` would lie among the patches of ``folder``, or cannot be made at all."""
    if storage.contains(folder, target):
        raise UserError(f"shards in {target} would lie among the patches; name a folder outside {folder} with --shards")
    _arrow()


def pack(folder: Place, target: Place) -> int:
    """Pack the patches of ``folder`` (with a manifest) into shards in ``target``; the number of patches.

    Nothing is written again where ``target`` already holds these patches, whole as far as it is on this machine. Raises UserError
    where a patch is missing, or where ``target`` holds patches of other slides, which may be all that is left of them.
    """
    with storage.scratch() as scratch:
        listed = storage.brought(folder / manifest.NAME, scratch)
        rows, digest = manifest.read_manifest(listed.parent), sha256(listed)
    before = _packed_before(target)
    if before and before.packed_from == digest and (isinstance(target, Remote) or _are_as_written(target)):
        return len(rows)
    _check_no_others(before, target, rows)
    rows.sort(key=lambda row: (row.split, derive_seed(0, row.path)))
    write_shards(target, track(_with_content(folder, rows), "pack", len(rows), "patches"), digest)
    return len(rows)


def _are_as_written(target: Path) -> bool:
    written = checksums(target)
    return all(sha256(target / name) == written[name] for name in track(written, "compare shards", unit="shards"))


def _with_content(folder: Place, rows: list[Patch]) -> Iterator[tuple[Patch, bytes]]:
    for start in range(0, len(rows), FETCHED_TOGETHER):
        some = rows[start : start + FETCHED_TOGETHER]
        with storage.scratch() as scratch:
            if isinstance(folder, Remote):
                storage.fetch({folder / row.path: inside(scratch, row.path) for row in some})
            here = scratch if isinstance(folder, Remote) else folder
            for row in some:
                yield row, _content(inside(here, row.path))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run check_data.py --quarantine") from error


def _check_no_others(before: Shards | None, target: Place, rows: list[Patch]) -> None:
    held = set(before.column("slide_id")) if before else set()
    others = held - {row.slide_id for row in rows}
    if len(others) > 0.5 * len(held):  # a slide or two may have lost all its patches to check_data.py
        raise UserError(
            f"{target} holds patches of {len(others)} slide(s) that are not among these, and they would be gone; name another "
            "folder with --shards, or remove them there yourself"
        )


def _packed_before(target: Place) -> Shards | None:
    """The shards that lie in ``target``; None where they are not whole."""
    there = storage.files_in(target)
    if NAME not in there:
        return None
    with storage.scratch() as scratch:
        try:
            return Shards(storage.brought(there[NAME], scratch).parent, there)
        except UserError:
            return None


def write_shards(target: Place, patches: Iterable[tuple[Patch, bytes]], digest: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write (row, content of its file) pairs, sorted by split, as shards of about ``shard_bytes`` and their index.

    The index goes first and comes last: shards without one are of a run that was stopped. ``digest`` names what was packed. On
    another file system each shard is sent when it is whole, and no more than one is here.
    """
    arrow, parquet = _arrow()
    types = dict.fromkeys(COLUMNS, "string") | _TYPES | _PLACE
    schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in types.items()], {"packed_from": digest})
    with storage.scratch() as scratch:
        here = scratch if isinstance(target, Remote) else target
        try:
            here.mkdir(parents=True, exist_ok=True)
            remove_leftovers(here)  # a killed run's shard is as large as a whole one
            storage.remove([target / NAME])
            written = {}
            with replacing(here / NAME) as file, parquet.ParquetWriter(file, schema) as index:
                for name, first, items in _portions(patches, shard_bytes):
                    entries = _write_shard(here / name, first, items)
                    index.write_table(arrow.Table.from_pylist(entries, schema))
                    written[name] = sha256(here / name)
                    storage.deliver(here / name, target / name)
                index.add_key_value_metadata({"sha256": json.dumps(written)})
            storage.deliver(here / NAME, target / NAME)
        except OSError as error:
            raise UserError(f"shards cannot be written to {here} ({error.strerror}); mend that and start again") from error
    there = storage.files_in(target)
    storage.remove([file for name, file in there.items() if _SHARD.fullmatch(name) and name not in written])


def _portions(patches: Iterable[tuple[Patch, bytes]], limit: int) -> Iterator[tuple[str, int, list[tuple[Patch, bytes]]]]:
    """(name of the shard, number of its first patch, its patches)."""
    items, size, first, number = [], 0, 0, 0
    for patch, content in patches:
        new_split = bool(items) and items[-1][0].split != patch.split
        if items and (new_split or size > limit):
            yield f"{items[-1][0].split}-{number:06d}.tar", first, items
            first, number = first + len(items), 0 if new_split else number + 1
            items, size = [], 0
        items.append((patch, content))
        size += len(content) + 4 * tarfile.BLOCKSIZE  # with headers, the label and padding
    if items:
        yield f"{items[-1][0].split}-{number:06d}.tar", first, items


def _write_shard(path: Path, first: int, items: list[tuple[Patch, bytes]]) -> list[dict]:
    """Write one tar; rows of the index. Nothing in it depends on when and by whom it was made."""
    entries = []
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (patch, content) in enumerate(items, start=first):
            key, row = f"{number:09d}", asdict(patch)
            offset = file.tell() + tarfile.BLOCKSIZE  # after the member's header
            entries.append(row | {"shard": path.name, "key": key, "offset": offset, "size": len(content)})
            _add(tar, key + Path(patch.path).suffix, content)
            _add(tar, f"{key}.json", json.dumps(row).encode())
    return entries


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# ----------------------------------------------------------------------------------------------------------------- reading


class Shards:
    """The index of a folder of shards.

    paths: of all patches, as in patches.csv, and in its order. packed_from: SHA-256 of the manifest that was packed. files: the
    shards by name where only the index is in ``folder``. Raises UserError where the index is damaged, or a shard is missing or
    shorter than the index says.
    """

    def __init__(self, folder: Path, files: Mapping[str, Place] | None = None):
        self.folder = Path(folder)
        arrow, parquet = _arrow()
        try:
            self._table = parquet.read_table(self.folder / NAME, columns=[*COLUMNS, *_PLACE]).sort_by("path")
            self.packed_from = (self._table.schema.metadata or {})[b"packed_from"].decode()
            self.paths = self.column("path")
            shards = self._table["shard"].combine_chunks().dictionary_encode()
            self._names, self._shard = shards.dictionary.to_pylist(), shards.indices.to_numpy()
            self._offset, self._size = (self._table[name].to_numpy() for name in ("offset", "size"))
        except (OSError, KeyError, UnicodeDecodeError, arrow.ArrowException) as error:
            raise UserError(f"{self.folder / NAME} is damaged ({' '.join(str(error).split())[:200]}); {_AGAIN}") from error
        self._check(storage.files_in(self.folder) if files is None else files)
        self._index = {path: number for number, path in enumerate(self.paths)}

    def column(self, name: str) -> list:
        """One column of the index, a value a patch; None where unknown. Equal texts are one object."""
        column = self._table[name]
        if str(column.type) != "string" or name == "path":
            return column.to_pylist()
        encoded = column.combine_chunks().dictionary_encode()
        values = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
        return values[encoded.indices.fill_null(len(values) - 1).to_numpy()].tolist()

    def rows(self) -> list[Patch]:
        """The manifest's rows."""
        return [Patch(*values) for values in zip(*(self.column(name) for name in COLUMNS), strict=True)]

    def content(self, path: str) -> bytes:
        """The file of a patch. Raises OSError where its shard can no longer be read."""
        row = self._index[path]
        with open(self.folder / self._names[self._shard[row]], "rb") as file:
            file.seek(self._offset[row])
            content = file.read(self._size[row])
        if len(content) < self._size[row]:
            raise OSError(f"{file.name} is cut short")
        return content

    def _check(self, files: Mapping[str, Place]) -> None:
        """The index against the values that a manifest may hold, and against the shards' sizes."""
        for name, allowed in (("label", LABELS), ("split", SPLITS)):
            if strange := set(self.column(name)) - set(allowed):
                raise UserError(f"{self.folder / NAME} has {name} {sorted(map(str, strange))[0]!r}; {_AGAIN}")
        ends = np.zeros(len(self._names), dtype=np.int64)
        np.maximum.at(ends, self._shard, self._offset + self._size)
        if len(self.paths) and min(self._offset.min(), self._size.min()) < 0:
            raise UserError(f"{self.folder / NAME} has a negative offset; {_AGAIN}")
        for name, end in zip(self._names, ends, strict=True):
            if not _SHARD.fullmatch(name) or name not in files or storage.size_of(files[name]) < end:
                raise UserError(f"shard {self.folder / name} is missing or cut short; bring it back, or {_AGAIN}")

    def faults(self) -> Iterator[str]:
        """What in the shards is not as the index says, member by member; nothing where all is well."""
        expected = {}
        for number, (key, row) in enumerate(zip(self.column("key"), self.rows(), strict=True)):
            expected.setdefault(self._names[self._shard[number]], []).append((key, row, int(self._offset[number])))
        for name, patches in expected.items():
            try:
                with tarfile.open(self.folder / name, "r:") as tar:
                    yield from _differences(name, tar, patches)
            except (tarfile.TarError, OSError) as error:
                yield f"{name}: {error}"


def _differences(name: str, tar: tarfile.TarFile, patches: list[tuple[str, Patch, int]]) -> Iterator[str]:
    members = {member.name: member for member in tar}
    for key, row, offset in patches:
        picture, label = members.get(key + Path(row.path).suffix), members.get(f"{key}.json")
        if picture is None or label is None:
            yield f"{name}: {key} is not in it"
        elif picture.offset_data != offset:
            yield f"{name}: {key} is not where the index says"
        else:
            try:
                same = json.load(tar.extractfile(label)) == asdict(row)
            except ValueError:
                same = False
            if not same:
                yield f"{name}: the label in {key}.json is not the one in the index"


@functools.lru_cache(maxsize=4)
def _opened(folder: Path, _modified: int) -> Shards:
    return Shards(folder)


def open_shards(folder: Path) -> Shards:
    """The shards of a folder, read once as long as their index does not change."""
    folder = Path(folder).resolve()
    return _opened(folder, os.stat(folder / NAME).st_mtime_ns)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each shard as it was packed, from the index; {} where an index of an older version says nothing."""
    arrow, parquet = _arrow()
    try:
        return json.loads((parquet.read_metadata(Path(folder) / NAME).metadata or {}).get(b"sha256", b"{}"))
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise UserError(f"{folder / NAME} is damaged ({' '.join(str(error).split())[:200]}); {_AGAIN}") from error
