"""Whole-file writes, locks, typed JSON fields, digests: each once."""

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, ParamSpec, TypeVar

if sys.platform != "win32":
    import fcntl

_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}

P = ParamSpec("P")
T = TypeVar("T")

# How a text in another encoding than UTF-8 begins, where it has a byte order mark.
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

# The first two bytes of every gzip file.
GZIP_MAGIC = b"\x1f\x8b"


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A path to write to, which becomes the file ``path`` when all went well: that one is never seen in part.

    A file that was there keeps its mode, and where anything fails it stays as it was. Of a symlink the file that it
    names is replaced; a device or a pipe is written directly.

    Raises:
        OSError: whatever was raised meanwhile, under the name of ``path``.
    """
    named = Path(path)
    if named.exists() and not named.is_file():
        yield named
        return
    target = Path(os.path.realpath(named))
    with _beside(target, named) as partial:
        partial.touch()
        mode = stat.S_IMODE((target if target.exists() else partial).stat().st_mode)
        yield partial
        _finish(partial, mode)


def write_whole(path: str | PathLike[str], text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


@contextmanager
def new_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """A folder to write files to, which becomes ``path`` when all went well; its parents are made.

    Raises:
        FileExistsError: as `check_new_folder`.
        OSError: whatever was raised meanwhile, under the name of ``path``; nothing is left.
    """
    check_new_folder(path)
    target = Path(path).resolve()
    with _beside(target, Path(path)) as partial:
        partial.mkdir(parents=True)
        mode = stat.S_IMODE(partial.stat().st_mode) & 0o666
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _finish(file, mode)


def check_new_folder(path: str | PathLike[str]) -> None:
    """Raise FileExistsError if something is there, other than an empty folder."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{path} is there already: name a new or empty folder")


def _finish(file: Path, mode: int) -> None:
    with file.open("r+b") as written:
        os.fsync(written.fileno())
    # safetensors makes its files readable by their owner alone.
    file.chmod(mode)


@contextmanager
def _beside(target: Path, named: Path) -> Iterator[Path]:
    """A path that is moved to the target; when something fails, what is there is removed."""
    # Nobody can guess the name, so no other process writes there, nor has put a symlink in the way.
    partial = target.with_name(f".{target.name}.{os.urandom(4).hex()}.partial")
    created = [parent for parent in target.parents if not parent.exists()]
    try:
        yield partial
        partial.replace(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
            for parent in created:
                parent.rmdir()
        if not isinstance(error, Exception):
            raise
        # torch and safetensors raise their own errors when the disk is full.
        kind = type(error) if isinstance(error, OSError) else OSError
        reason = reason_of(error).replace(str(partial), str(named))
        if isinstance(error, OSError) and not str(error.filename or partial).startswith(str(partial)):
            reason += f": {error.filename!r}"
        kept = "; what was saved before is still there" if target.is_file() else ""
        raise kind(f"cannot write {named}: {reason}{kept}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says: libraries put advice, traces and addresses after it."""
    return str(error).strip().partition("\n")[0]


def reason_of(error: Exception) -> str:
    """What an error says, in one line and without a number of the system's; of a full disk also what to do."""
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return f"{reason}: make room, then give the command again" if "space left" in reason else reason


def lock(file: int | BinaryIO) -> bool:
    """Lock an open file or folder until it is closed, or the process ends, however it ends.

    False where another process holds it; True where there are no locks.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


class NotUtf8Error(ValueError):
    """A text is in another encoding."""


def utf8(raw: bytes) -> str:
    """A text in UTF-8, without a byte order mark; `NotUtf8Error` says where it is none, and how to make it one."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        marked = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), None)
        found = f"the mark of {marked}" if marked else f"byte {error.start + 1} is 0x{error.object[error.start]:02x}"
        advice = f"convert it, as by `iconv -f {marked or 'WINDOWS-1252'} -t UTF-8`"
        raise NotUtf8Error(f"not UTF-8 text ({found}): {advice}") from error


class Json(NamedTuple):
    """A value of a JSON document, and its place there, such as ``data[3].id``; the document's own place is empty.

    What a value is not, ValueError says, with its place, what was expected, and what was found.
    """

    value: Any
    place: str = ""

    @classmethod
    def parse(cls, raw: bytes | str) -> "Json":
        """The document in a text; ValueError says where it is no JSON, or no UTF-8."""
        try:
            return cls(json.loads(raw if isinstance(raw, str) else utf8(raw)))
        except json.JSONDecodeError as error:
            line = "" if error.lineno == 1 else f"line {error.lineno}, "
            raise ValueError(f"not JSON ({error.msg.removesuffix(' at')} at {line}character {error.colno})") from error
        except NotUtf8Error:
            raise
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
            raise ValueError(f"not JSON ({error})") from error

    def of(self, *kinds: type[T]) -> T:
        """The value, of one of these types: dict, list, str, bool, int, or float, which is any finite number."""
        kind, value = type(self.value), self.value
        if float in kinds and kind in (int, float) and abs(value) <= sys.float_info.max:
            value = float(value)
        elif kind is float or kind not in kinds:
            raise self.error(f"expected {' or '.join(map(_kind, kinds))}, found {_shown(value)}")
        return value

    def items(self) -> list["Json"]:
        """The members of a list."""
        return [Json(item, f"{self.place}[{index}]") for index, item in enumerate(self.of(list))]

    def field(self, name: str) -> "Json":
        """A field of an object."""
        if not isinstance(self.value, dict):
            raise self.error(f"expected an object with {name!r}, found {_shown(self.value)}")
        found = Json(self.value.get(name), f"{self.place}.{name}" if self.place else name)
        if name not in self.value:
            raise found.error(f"missing; the object has {', '.join(sorted(self.value)) or 'no fields'}")
        return found

    def get(self, name: str) -> "Json | None":
        """A field of an object, None where it is missing or null."""
        return None if isinstance(self.value, dict) and self.value.get(name) is None else self.field(name)

    def exactly(self, names: Iterable[str]) -> "Json":
        """This object, which must have these fields and no others."""
        missing, unknown = sorted(set(names) - set(self.of(dict))), sorted(set(self.value) - set(names))
        if missing or unknown:
            raise self.error(f"expected the fields {', '.join(names)}: missing {missing}, unknown {unknown}")
        return self

    def record(self, make: Callable[..., T]) -> T:
        """A dataclass or NamedTuple of plain values, from an object with its fields and no others."""
        fields = self.exactly(make.__annotations__)
        return make(*(fields.field(name).of(kind) for name, kind in make.__annotations__.items()))

    def made(self, make: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """What is made of this value: a ValueError or TypeError of ``make`` gets its place."""
        with naming(self.place):
            return make(*arguments, **options)

    def error(self, message: str) -> ValueError:
        """A ValueError about this value."""
        return ValueError(f"{self.place}: {message}" if self.place else message)


def _kind(kind: type) -> str:
    return _KINDS.get(kind, "a finite number")


def _shown(value: Any) -> str:
    return _kind(type(value)) if type(value) in (dict, list) else json.dumps(value, default=repr)[:40]


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the fields in which two objects differ, sorted; a field that is missing is null."""
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


@contextmanager
def naming(place: object, advice: str = "") -> Iterator[None]:
    """Put a name, such as a file's, before what a ValueError or TypeError says, and advice behind it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}{advice}" if place else f"{error}{advice}") from error


def text_sha256(text: str) -> str:
    """The SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
