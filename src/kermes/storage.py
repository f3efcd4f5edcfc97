"""Directories of files that are whole: written in one step, and checked before a byte of them is used.

A directory has a file ``checksums.json`` with the size of every other file and a checksum of every block of it, and a
checksum of itself. A block is checked when it is read, so that reading a little of a large file costs little, and
nothing that was altered or cut short is ever taken for data.

Paths are those of `fsspec`: a path of this machine, or ``s3://...``, ``memory://...`` and what else is installed.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from kermes.errors import FileError

CHECKSUMS = "checksums.json"
"""The file of checksums in a directory."""

POINTER = "current.json"
"""Where directories cannot be renamed in one step: the file that names the directory that holds."""

ARCHIVE = ".kermes"
"""How the name of a directory ends that is one file."""

_ZIP_HEADER = 30
_LEAST_BLOCK = 1 << 13
_MOST_BLOCKS = 2048
_DIGEST_BYTES = 8
_BLOCKS_KEPT = 128
_SEAL = "checksum"


def _digest(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


# ---------------------------------------------------------------- JSON with a checksum of itself


def sealed_json(content: Mapping[str, Any]) -> str:
    """Write a JSON object with a checksum of itself under the key ``checksum``."""
    return json.dumps({**content, _SEAL: _digest(_canonical(content))}, indent=1) + "\n"


def open_sealed(text: str | bytes) -> dict[str, Any]:
    """Read what `sealed_json` wrote, without its checksum.

    Raises
    ------
    ValueError
        If it is no such text, or was altered.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if content.pop(_SEAL, None) != _digest(_canonical(content)):
        raise ValueError("its checksum is wrong")
    return content


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


# ---------------------------------------------------------------- reading


class _Blocks:
    """A file of a directory, in blocks that are checked before they are used; the latest are kept."""

    def __init__(self, folder: Folder, name: str, size: int, block: int, digests: bytes | None) -> None:
        self.size = size
        self._folder, self._name = folder, name
        self._block, self._digests = block, digests
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def range(self, start: int, end: int) -> bytes:
        """Read a part of the file; by any number of threads."""
        with self._lock:
            return self._range(start, end)

    def _range(self, start: int, end: int) -> bytes:
        first, last = start // self._block, -(-end // self._block)
        blocks = {number: self._kept[number] for number in range(first, last) if number in self._kept}
        missing = [number for number in range(first, last) if number not in blocks]
        if missing:
            low, high = missing[0] * self._block, min((missing[-1] + 1) * self._block, self.size)
            content = memoryview(self._folder.read_range(self._name, low, high))
            for number in range(missing[0], missing[-1] + 1):
                block = content[number * self._block - low : (number + 1) * self._block - low]
                self._check(number, block)
                blocks[number] = bytes(block)
        for number, kept in blocks.items():
            self._kept[number] = kept
            self._kept.move_to_end(number)
        while len(self._kept) > _BLOCKS_KEPT:
            self._kept.popitem(last=False)
        joined = b"".join(blocks[number] for number in range(first, last))
        return joined[start - first * self._block : end - first * self._block]

    def _check(self, number: int, block: memoryview) -> None:
        if self._digests is None:
            return
        expected = self._digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES]
        if len(block) == 0 or hashlib.blake2b(block, digest_size=_DIGEST_BYTES).digest() != expected:
            raise damaged(self._folder.name_of(self._name), "what is read is not what was written")


class _Reader(io.RawIOBase):
    """A file of a directory, as who reads Parquet wants it: with a position."""

    def __init__(self, blocks: _Blocks) -> None:
        self._blocks = blocks
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._blocks.size

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._blocks.size}[whence]
        return self._at

    def read(self, n: int | None = -1, /) -> bytes:
        end = self._blocks.size if n is None or n < 0 else min(self._at + n, self._blocks.size)
        if end <= self._at:
            return b""
        content = self._blocks.range(self._at, end)
        self._at = end
        return content


def damaged(name: str, what: object) -> FileError:
    """Make the error of a file that cannot be what it should be."""
    text = (str(what).splitlines() or [repr(what)])[0]
    return FileError(f"{name} must be a file of a kermes result, but is damaged: {text}")


class _OneFile:
    """A file in memory, as a file system wants to be asked for it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def isfile(self, path: str) -> bool:
        return True

    exists = isfile

    def open(self, path: str, mode: str) -> io.BytesIO:
        return io.BytesIO(self._content)

    def cat_file(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        return self._content[start:end]


@dataclass(eq=False)
class Folder:
    """A directory that is read, by any path of fsspec."""

    path: str
    """As it was given."""

    filesystem: Any
    """What fsspec reads it with."""

    root: str
    """The path as `filesystem` wants it."""

    members: Mapping[str, tuple[int, int]] | None = None
    """Of a directory that is one file: first byte and size of every file in it. None: it is a directory."""

    bytes_read: int = 0
    """How much was read from it so far."""

    _open: dict[str, _Blocks] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | PathLike[str]) -> Folder:
        """Find what reads a path.

        A path that ends in `ARCHIVE` is that of one file with all files of the directory in it.

        Raises
        ------
        FileError
            If fsspec cannot read such paths, or it is such a file but damaged.
        """
        try:
            filesystem, root = fsspec.core.url_to_fs(os.fspath(path))
        except (ValueError, ImportError) as error:
            raise FileError(f"path must be one that fsspec can read, got {path}: {error}") from None
        folder = cls(str(path), filesystem, str(root).rstrip("/"))
        if folder.is_archive and filesystem.isfile(folder.root):
            folder.members = folder._members()
        return folder

    @classmethod
    def of_bytes(cls, content: bytes, name: str = "memory") -> Folder:
        """Read the content of a file with all files of a directory in it.

        Raises
        ------
        FileError
            If it is damaged.
        """
        folder = cls(name, _OneFile(content), name + ARCHIVE)
        folder.members = folder._members()
        return folder

    @property
    def is_archive(self) -> bool:
        """Whether it is one file."""
        return self.root.lower().endswith(ARCHIVE)

    def _members(self) -> dict[str, tuple[int, int]]:
        """Find the files in the one file, which is a zip archive whose members are not compressed."""
        found = {}
        try:
            with self.filesystem.open(self.root, "rb") as file, zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if member.compress_type != zipfile.ZIP_STORED:
                        raise damaged(self.path, f"{member.filename} in it is compressed")
                    file.seek(member.header_offset)
                    header = file.read(_ZIP_HEADER)
                    # The header is followed by the name and by extra fields, whose lengths end it.
                    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                    found[member.filename] = member.header_offset + _ZIP_HEADER + lengths, member.file_size
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            if isinstance(error, FileError):
                raise
            raise damaged(self.path, error) from None
        return found

    @property
    def is_local(self) -> bool:
        """Whether it lies on a file system of this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    def name_of(self, name: str) -> str:
        """Name a file of it in messages."""
        return f"{self.path}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether it has a file; without a name, whether it is there itself."""
        if name and self.members is not None:
            return name in self.members
        return bool(self.filesystem.exists(f"{self.root}/{name}" if name else self.root))

    def names(self) -> list[str]:
        """Names of what it holds."""
        if self.members is not None:
            return sorted(self.members)
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self.filesystem.ls(self.root, detail=False))

    def size(self, name: str) -> int:
        """Size of a file [bytes].

        Raises
        ------
        FileError
            If it is missing.
        """
        if self.members is not None:
            if name not in self.members:
                raise self._missing(name)
            return self.members[name][1]
        try:
            return int(self.filesystem.info(f"{self.root}/{name}")["size"])
        except FileNotFoundError:
            raise self._missing(name) from None

    def _missing(self, name: str) -> FileError:
        return FileError(f"{self.path} must be a complete kermes result, but {name} is missing")

    def read(self, name: str) -> bytes:
        """Read a whole file as it is, unchecked.

        Raises
        ------
        FileError
            If it cannot be read.
        """
        return self.read_range(name, 0, None)

    def read_range(self, name: str, start: int, end: int | None) -> bytes:
        """Read a part of a file as it is, unchecked; errors as those of `read`."""
        path = f"{self.root}/{name}"
        if self.members is not None:
            size = self.size(name)
            path, first = self.root, self.members[name][0]
            start, end = first + start, first + (size if end is None else min(end, size))
        try:
            content = bytes(self.filesystem.cat_file(path, start=start, end=end))
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise damaged(self.name_of(name), error) from None
        self.bytes_read += len(content)
        return content

    @cached_property
    def checksums(self) -> Mapping[str, Any] | None:
        """What was noted of the files when they were written; None: nothing, as in results of older versions."""
        if not self.exists(CHECKSUMS):
            return None
        try:
            files: Mapping[str, Any] = open_sealed(self.read(CHECKSUMS))["files"]
        except (ValueError, KeyError) as error:
            raise damaged(self.name_of(CHECKSUMS), error) from None
        return files

    def file(self, name: str) -> Any:
        """Open a file for reading; every block is checked before it is used.

        Nothing is held open: each read is a request of its own, and the latest blocks are kept. What is returned has a
        position of its own, so that threads can read at the same time.

        Raises
        ------
        FileError
            If it is missing or does not have the size that it was written with; while it is read, if what is read was
            altered.
        """
        if name not in self._open:
            size, known = self.size(name), self.checksums
            if known is None:
                self._open[name] = _Blocks(self, name, size, _LEAST_BLOCK, None)
            else:
                try:
                    expected, block = int(known[name]["size"]), int(known[name]["block"])
                    digests = bytes.fromhex(known[name]["checksums"])
                except (KeyError, TypeError, ValueError) as error:
                    raise damaged(self.name_of(CHECKSUMS), error) from None
                if size != expected:
                    raise damaged(self.name_of(name), f"it has {size} bytes, and had {expected}")
                self._open[name] = _Blocks(self, name, size, block, digests)
        return _Reader(self._open[name])


# ---------------------------------------------------------------- writing


def _checksums_of(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    block = _LEAST_BLOCK
    while block * _MOST_BLOCKS < size:
        block *= 2
    with path.open("rb") as file:
        digests = [_digest(content) for content in iter(lambda: file.read(block), b"")]
    return {"size": size, "block": block, "checksums": "".join(digests)}


def write_file(path: str | PathLike[str], content: bytes, overwrite: bool = True) -> None:
    """Write one file, whole or not at all.

    Raises
    ------
    FileError
        If it exists and may not be replaced, or cannot be written.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileError(f"output must be new, got {path}, which exists; overwrite replaces it")
    part = sibling(target)
    try:
        try:
            part.write_bytes(content)
            sync(part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"output {path} cannot be written: {error.strerror or error}") from None


def seal(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of some of the files of a directory."""
    files = {name: _checksums_of(folder / name) for name in sorted(names)}
    (folder / CHECKSUMS).write_text(sealed_json({"algorithm": "blake2b, 8 bytes per block", "files": files}))


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sibling(target: Path) -> Path:
    """Name a new directory beside the target, on the same file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _swap(one: Path, other: Path) -> bool:
    """Give two directories each other's name in one step; False where the system cannot."""
    names: dict[str, tuple[str, tuple[int | bytes, ...]]] = {}
    names["linux"] = ("renameat2", (-100, os.fsencode(one), -100, os.fsencode(other), 2))
    names["darwin"] = ("renamex_np", (os.fsencode(one), os.fsencode(other), 2))
    if sys.platform not in names:
        return False
    name, arguments = names[sys.platform]
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return False
    if function(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


def publish(folder: Path, target: Path, overwrite: bool) -> None:
    """Rename a complete directory into place; what was there goes away when the new one is in place.

    Whoever reads `target` finds the old directory or the new one, and of two that write to it the one that comes last
    stays. Only where the system cannot swap two names is there a moment without either.

    Raises
    ------
    OSError
        If that fails, or it is there already and may not be replaced; then it stays as it was.
    """
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    taken = (errno.ENOTEMPTY, errno.EEXIST)
    while True:
        try:
            folder.rename(target)  # fails unless it is new or an empty directory
            break
        except OSError as error:
            if error.errno not in taken or not overwrite:
                raise
        old = sibling(target)
        try:
            if _swap(folder, target):
                shutil.rmtree(folder)
                break
            target.rename(old)
        except FileNotFoundError:  # another writer took it away
            continue
        try:
            folder.rename(target)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in taken:  # another writer was faster
                shutil.rmtree(old)
                continue
            old.rename(target)
            raise
        shutil.rmtree(old)
        break
    sync(target.parent)


def archive_of(folder: Path) -> bytes:
    """Put all files of a directory into one, uncompressed, so that parts of them can be read where they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.iterdir()):
            # A date of its own would make the same files other bytes.
            archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes())
    return buffer.getvalue()


def upload(folder: Path, target: Folder) -> None:
    """Copy a complete directory to where directories cannot be renamed in one step.

    The files go into a new directory below `target`; then one small file is replaced, which names it. Earlier
    directories are removed after that.
    """
    name = secrets.token_hex(8)
    filesystem = target.filesystem
    filesystem.makedirs(f"{target.root}/{name}", exist_ok=True)
    try:
        for file in sorted(folder.iterdir()):
            filesystem.pipe_file(f"{target.root}/{name}/{file.name}", file.read_bytes())
        filesystem.pipe_file(f"{target.root}/{POINTER}", sealed_json({"folder": name}).encode())
    except BaseException:
        filesystem.rm(f"{target.root}/{name}", recursive=True)
        raise
    for old in target.names():
        if old not in (name, POINTER):
            filesystem.rm(f"{target.root}/{old}", recursive=True)


def current(folder: Folder) -> Folder:
    """Follow the file that `upload` wrote last, if there is one.

    Raises
    ------
    FileError
        If it is damaged.
    """
    if folder.is_local or folder.is_archive or not folder.exists(POINTER):
        return folder
    try:
        name = open_sealed(folder.read(POINTER))["folder"]
    except (ValueError, KeyError) as error:
        raise damaged(folder.name_of(POINTER), error) from None
    return Folder(folder.path, folder.filesystem, f"{folder.root}/{name}")
