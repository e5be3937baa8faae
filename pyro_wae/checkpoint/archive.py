"""The file of a checkpoint: one of ``torch.save``, whose last bytes, a zip archive's comment, are the digest of all."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import torch

MARK = b"pyro_wae sha256 "
TRAILER = len(MARK) + 2 * hashlib.sha256().digest_size


def write_archive(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that is whole or not there, and that can be read again.

    Raises:
        TypeError: If ``torch.load`` would refuse the content.
        OSError: If the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w+b") as file:
            torch.save(content, file)
            _append_digest(file)
            file.flush()
            _check_readable(temporary)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_archive(path: Path) -> tuple[Any, bool]:
    """The content, and whether the file has a digest, which is then right.

    Raises:
        ValueError: If the file is damaged.
        OSError: If there is none that can be opened.
    """
    with open(path, "rb") as file:
        try:
            has_digest = _compare_digest(file)
            if not has_digest:
                # torch.load compares no checksums.
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
                if damaged is not None:
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            file.seek(0)
            return torch.load(file, map_location=_where_it_was, weights_only=True), has_digest
        except Exception as error:  # a decoder of changed bytes may raise anything
            raise ValueError(
                f"{path} is damaged, or was not written by save_checkpoint ({type(error).__name__}: {error}). Load "
                "another one."
            ) from error


def _append_digest(file: BufferedRandom) -> None:
    # The length of the comment stands in the last two bytes before it.
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", TRAILER))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.write(MARK + digest.encode())


def _compare_digest(file: BufferedReader) -> bool:
    """Whether a file states a digest; raises if it is wrong."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        trailer = data[-TRAILER:]
        if not trailer.startswith(MARK):
            return False
        with memoryview(data) as whole, whole[:-TRAILER] as body:
            digest = hashlib.sha256(body).hexdigest()
    if MARK + digest.encode() != trailer:
        raise ValueError("the digest at its end is that of another content")
    return True


def _check_readable(path: Path) -> None:
    """Reads all but the tensors' values, which are mapped into memory and not touched."""
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise TypeError(
            "This content could not be loaded again, and was not saved. Look for tensors of a subclass and integers "
            f"of over 2,000 bits, in extra first, and keep them apart ({type(error).__name__}: {error})."
        ) from error


def _where_it_was(storage: Any, location: str) -> Any:
    """None where the device that a tensor was on exists, else the storage as it is, on the CPU."""
    device = torch.device(location)
    is_here = device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
    return None if is_here else storage
