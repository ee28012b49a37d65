"""Workspaces: one directory per task, owned by its id range. Which range a task has is written in its workspace's owner, so no range
is used again while anything of its old owner remains."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from agentd.core import addresses
from agentd.core.errors import NotFound, RequestError, TooLarge, TryLater, WrongState
from agentd.warden import syscalls as sc

INPUT_LIMIT_BYTES = 64 << 20
CHUNK = 1 << 20
BENEATH = sc.RESOLVE_BENEATH | sc.RESOLVE_NO_SYMLINKS | sc.RESOLVE_NO_MAGICLINKS


class Workspaces:
    """The directory of all workspaces: root's alone."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(path, 0o700)
        self._next = 0

    def slot(self, name: str) -> int:
        """The slot that `name` owns.

        Raises:
            NotFound: it has no workspace.
        """
        try:
            return self._slot_of(self.path / name)
        except FileNotFoundError:
            raise NotFound(f"cannot use workspace {name!r}: there is none") from None

    @staticmethod
    def _slot_of(path: Path) -> int:
        return (path.lstat().st_uid - addresses.ID_BASE) // addresses.ID_RANGE

    def create(self, name: str) -> int:
        """The slot of `name`, its workspace made if there was none.

        Raises:
            TryLater: every id range is taken.
        """
        path = self.path / name
        if path.exists():
            return self._slot_of(path)
        taken = {self._slot_of(other) for other in self.path.iterdir()}
        for offset in range(addresses.SLOTS):
            slot = (self._next + offset) % addresses.SLOTS
            if slot not in taken:
                break
        else:
            raise TryLater(
                f"cannot make a workspace: all {addresses.SLOTS} id ranges are in use",
                hint="remove ended tasks: agentctl rm",
            )
        self._next = slot + 1
        owner = addresses.slot_id_base(slot) + addresses.AGENT_ID
        hidden = self.path / f".new-{name}"
        if hidden.exists():
            os.rmdir(hidden)
        hidden.mkdir(mode=0o755)
        os.chown(hidden, owner, owner)
        os.chmod(hidden, 0o755)
        hidden.rename(path)
        return slot

    def open(self, name: str) -> int:
        """A descriptor of the directory."""
        self.slot(name)
        return os.open(self.path / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def put(self, name: str, relative: str, mode: int, source: int) -> int:
        """Copy `source` to the file `relative` (directories made, an older file replaced), owned by the agent; its size.

        The caller makes sure that nothing runs in the workspace. Symbolic links an earlier attempt left are never followed.
        """
        owner = addresses.slot_id_base(self.slot(name)) + addresses.AGENT_ID
        directory = self.open(name)
        try:
            *parents, last = relative.split("/")
            for part in parents:
                try:
                    os.mkdir(part, 0o755, dir_fd=directory)
                    os.chmod(part, 0o755, dir_fd=directory)  # whatever our umask took away
                    os.chown(part, owner, owner, dir_fd=directory, follow_symlinks=False)
                except FileExistsError:
                    pass
                try:
                    below = sc.openat2(directory, part, os.O_RDONLY | os.O_DIRECTORY, BENEATH)
                except OSError as error:
                    raise RequestError(
                        f"cannot write input {relative!r}: {part!r} is not a directory", field="inputs"
                    ) from error
                os.close(directory)
                directory = below
            hidden = f".agentd-input-{os.getpid()}"
            file = os.open(
                hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory
            )
            try:
                size = 0
                while chunk := os.pread(source, CHUNK, size):
                    size += len(chunk)
                    if size > INPUT_LIMIT_BYTES:
                        raise TooLarge(
                            f"cannot write input {relative!r}: over {INPUT_LIMIT_BYTES} bytes", field="inputs"
                        )
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(file, view) :]
                os.fchown(file, owner, owner)
                os.fchmod(file, mode & 0o755)
                try:
                    os.rename(hidden, last, src_dir_fd=directory, dst_dir_fd=directory)
                except IsADirectoryError as error:
                    raise RequestError(f"cannot write input {relative!r}: it is a directory", field="inputs") from error
            except BaseException:
                os.unlink(hidden, dir_fd=directory)
                raise
            finally:
                os.close(file)
            return size
        finally:
            os.close(directory)

    def remove(self, name: str) -> None:
        """Take the workspace and all in it away; harmless if there is none."""
        path = self.path / name
        if not path.exists():
            return
        if not shutil.rmtree.avoids_symlink_attacks:
            raise WrongState("cannot remove a workspace safely on this platform")
        shutil.rmtree(path)
