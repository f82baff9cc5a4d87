"""Files that survive: whole or not there, and appended lines that are there or not.

Lightning's own way to write a checkpoint was read and found not atomic (2.6.6, with fsspec): it
fills a file in the system's temporary folder and moves it, which between two filesystems is a copy
under the final name; nothing is synced; a killed write leaves the temporary file for ever.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.io import TorchCheckpointIO

from .ranks import world_size

_ENDING = ".unfinished"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that a disk is full, read-only or broken, or a file too large."""
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Fills a file so that a crash at any moment, also of the machine, leaves the old or the new.

    Args:
        path: of the file in the end; beside it stands `.NAME.unfinished` meanwhile.

    Yields:
        The file to fill.

    Raises:
        OSError: it could not be written; names the file, whose old content is untouched.
    """
    unfinished = path.with_name(f".{path.name}{_ENDING}")
    try:
        with unfinished.open("wb") as file:
            target = _ErrorsLater(file)
            yield target
            target.raise_error()
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except BaseException as failed:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)  # it takes room that others may need
        if isinstance(failed, OSError) and failed.errno is not None:
            raise OSError(failed.errno, f"cannot write {path}: {failed.strerror}") from failed
        raise


class _ErrorsLater:
    """A file whose errors wait: torch.save's writer in C++ turns them into others, or aborts."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Done at the end, once."""

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old or the new one, whole."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def append_text(path: Path, text: str) -> None:
    """Appends to a file, all of it or nothing.

    Args:
        path: of the file; made if there is none.
        text: whole lines.

    Raises:
        OSError: it could not be written; names the file, which is as long as before.
    """
    data = text.encode("utf-8")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            while data:  # on a disk with a little room left a write takes a part
                data = data[os.write(descriptor, data) :]
        except OSError as failed:
            with contextlib.suppress(OSError):  # what comes first is what to say
                os.ftruncate(descriptor, before)
            raise OSError(failed.errno, f"cannot append to {path}: {failed.strerror}") from failed
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Has the system write a file to the disk now, if there is such a file."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def clear_unfinished(folder: Path) -> None:
    """Removes what killed writes have left in a folder.

    Args:
        folder: its files only, not those of folders in it.
    """
    for path in folder.glob(f".*{_ENDING}"):
        if path.is_file():
            path.unlink()


def check_whole(path: Path) -> None:
    """Raises unless a checkpoint is there from its first to its last byte.

    Args:
        path: a file that torch.save has written.

    Raises:
        ValueError, zipfile.BadZipFile: it was cut, or a checksum in it is another.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"the checksum of {broken} in it is another")


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, each whole or not there, also after a crash of the machine.

    On several processes only the first one writes, and an error of its own would leave the others
    waiting: there it is kept, and raised by `raise_together`, which all of them call.
    """

    def __init__(self) -> None:
        self._failed: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint, straight to the disk.

        Args:
            checkpoint: what torch.save takes.
            path: of the file; its folder is made.
            storage_options: None.

        Raises:
            OSError: on a single process: it could not be written, and nothing has changed.
        """
        if storage_options is not None:
            raise ValueError(f"storage_options: expected None, got {storage_options!r}")
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                torch.save(checkpoint, file)
        except OSError as failed:
            if world_size() == 1:
                raise
            self._failed = failed

    def raise_together(self) -> None:
        """On every process: the error of the first one's last write, if there was one.

        Raises:
            OSError: it could not be written, and nothing has changed.
        """
        failed, self._failed = self._failed, None
        raise_on_all(failed)


def raise_on_all(failed: OSError | None) -> None:
    """Raises the first process's error on every process; all of them must call.

    Args:
        failed: None where all went well; of other processes it is not looked at.

    Raises:
        OSError: the first process's.
    """
    told = [failed]
    if world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise told[0]


def _sync_folder(folder: Path) -> None:
    """So that a rename is on the disk; not every system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
