"""Places: local files, and those of any other file system that fsspec knows, such as s3://."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtbert.files import replacing

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True)
class Place:
    """A path in a file system.

    Attributes:
        fs: the file system.
        path: in it; a local one is absolute.
        local: whether it is this machine's.
    """

    fs: "AbstractFileSystem"
    path: str
    local: bool

    @classmethod
    def of(cls, name: str) -> "Place":
        """The place of a path or a URL.

        Raises:
            ValueError: a kind of URL that is not known, or whose package is not installed; the message names it.
        """
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        if "://" not in name:  # where "::" is no chain of URLs
            path = Path(name)
            with suppress(RuntimeError):  # a ~ of nobody is a name like others
                path = path.expanduser()
            return cls(LocalFileSystem(), path.absolute().as_posix(), True)
        try:
            fs, path = url_to_fs(name)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{name}: {error}") from error
        return cls(fs, path, isinstance(fs, LocalFileSystem))

    @property
    def name(self) -> str:
        """What `of` makes this place of again, on any machine: an absolute path, or a URL."""
        return self.path if self.local else self.fs.unstrip_protocol(self.path)

    def at(self, path: str) -> "Place":
        """Another path in the same file system."""
        return Place(self.fs, path, self.local)

    def __truediv__(self, name: str) -> "Place":
        return self.at(f"{self.path.rstrip('/')}/{name}")

    def write(self, content: bytes) -> None:
        """Write the file whole: whoever reads it, whenever, sees what was there before, or all of this.

        Raises:
            OSError: it cannot be written.
        """
        if self.local:
            with replacing(self.path) as partial:
                partial.write_bytes(content)
            return
        # A name that nobody else writes; the folder's readers pass over what begins with a point.
        folder, _, name = self.path.rpartition("/")
        partial_path = f"{folder}/.{name}.{os.urandom(4).hex()}.partial"
        self.fs.pipe_file(partial_path, content)
        self.fs.mv(partial_path, self.path)
