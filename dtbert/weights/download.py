"""Files of the hub, fetched into huggingface_hub's cache; what a server says is checked before it names a file there.

The layout of the cache is huggingface_hub's: ``blobs/ETAG``, ``snapshots/COMMIT/NAME``, ``refs/REVISION`` and
``.no_exist/COMMIT/NAME``.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

T = TypeVar("T")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._+=-]{0,127}")
# What git allows in the name of a branch or tag, and no path that leads elsewhere.
_REVISION_PART = re.compile(r"[^./\\~^:?*\[\s\x00-\x1f\x7f-][^/\\~^:?*\[\s\x00-\x1f\x7f]*")

# A download that brings less than this in this time (bytes, seconds) is given up, and a request without an answer.
_LEAST_BYTES, _PATIENCE = 64 * 2**10, 60.0
# Breaks in a row, without a byte between them, after which a download is given up.
_MOST_BREAKS = 4
# Largest file that is no weights, or whose size no server announces.
_MOST_BYTES = 256 * 2**20


class HubError(OSError):
    """The hub answered what no hub should, or makes one wait too long."""


class Remote(NamedTuple):
    """A file on the hub: where it is, at which commit, its name among the blobs, and its size in bytes if known."""

    url: str
    commit: str
    etag: str
    size: int | None


def check_revision(revision: str | None) -> None:
    """Raise TypeError or ValueError unless it is None or may be the name of a branch, tag or commit."""
    if revision is None:
        return
    if not isinstance(revision, str):
        raise TypeError(f"revision must be a string, not {type(revision).__name__}")
    named = len(revision) < 256 and ".." not in revision
    if not named or not all(_REVISION_PART.fullmatch(part) for part in revision.split("/")):
        raise ValueError(f"revision {revision!r:.80} is no name of a branch, tag or commit")


def ask(repo_id: str, name: str, revision: str | None) -> Remote:
    """What the hub says of a file, in one request without retries.

    Raises:
        HubError: the answer cannot be a hub's.
        TimeoutError: there is none in time.
        Exception: whatever huggingface_hub raises.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo_id, name, revision=revision)
    found = _in_time(lambda: get_hf_file_metadata(url))
    commit, etag = found.commit_hash or "", found.etag or ""
    if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision or "") and commit != revision):
        raise HubError(f"the hub names {commit!r:.80} as the commit of {name} of {repo_id!r} at {revision or 'main'!r}")
    if not _ETAG.fullmatch(etag):
        raise HubError(f"the hub names {etag!r:.80} as the ETag of {name} of {repo_id!r}, which is none")
    # The commit's own place, so that what is read next is of the same commit.
    return Remote(hf_hub_url(repo_id, name, revision=commit), commit, etag, found.size)


def download(repo_id: str, name: str, remote: Remote, *, weights: bool) -> Path:
    """The file in the cache, fetched if it is not there; what broke off goes on a few times.

    Raises:
        OSError: it cannot be fetched, in time or at all, or not be written.
    """
    storage = _storage(repo_id)
    blob, pointer = storage / "blobs" / remote.etag, storage / "snapshots" / remote.commit / name
    if not blob.exists():
        blob.parent.mkdir(parents=True, exist_ok=True)
        with _beside(blob) as partial, partial.open("xb") as file:
            _Transfer(name, remote, weights).into(file)
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not pointer.exists():
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except FileExistsError:  # another process was first
            pass
        except OSError:  # a file system without links
            blob.replace(pointer)
    return pointer


def note_absent(repo_id: str, name: str, commit: str) -> None:
    """Remember that there is no such file at a commit."""
    note = _storage(repo_id) / ".no_exist" / commit / name
    with suppress(OSError):  # it is asked for again
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def note_commit(repo_id: str, revision: str | None, commit: str) -> None:
    """Remember the commit of a branch or tag, for when there is no network."""
    if revision == commit:
        return
    reference = _storage(repo_id) / "refs" / (revision or "main")
    with suppress(OSError):
        if reference.is_file() and reference.read_text("utf-8") == commit:
            return
        reference.parent.mkdir(parents=True, exist_ok=True)
        with _beside(reference) as partial:
            partial.write_text(commit, "utf-8")


def _storage(repo_id: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def _in_time(call: Callable[[], T]) -> T:
    """What a call gives, or raises; one that reads an answer byte by byte, each just in time, is left behind."""
    ended: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except BaseException as error:
            ended.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        found, error = ended.get(timeout=_PATIENCE)
    except Empty:
        raise TimeoutError(f"no answer in {_PATIENCE:g} seconds") from None
    if error is not None:
        raise error
    return cast(T, found)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A path that is moved to the target where all goes well, and otherwise removed."""
    partial = target.with_name(f"{target.name}.{os.urandom(4).hex()}.incomplete")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


class _Transfer:
    """The body of a file, as it comes: bounded in size, in breaks, and in how slow it may be."""

    def __init__(self, name: str, remote: Remote, weights: bool) -> None:
        self._name, self._url, self._size = name, remote.url, remote.size
        self._limit = _MOST_BYTES if remote.size is None else remote.size
        if not weights and self._limit > _MOST_BYTES:
            raise HubError(f"{name} on the hub has {self._limit:,} bytes, which no such file has")
        self._mark, self._since = time.monotonic(), 0

    def into(self, file: BinaryIO) -> None:
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        breaks = 0
        shown: dict[str, Any] = {"total": self._size, "unit": "B", "unit_scale": True, "desc": self._name}
        with tqdm(**shown, disable=None) as bar:  # type: ignore[no-untyped-call]
            while True:
                begin = file.tell()
                try:
                    self._receive(file, bar)
                    return
                except OSError:
                    raise
                except Exception as error:  # the transport's errors differ from version to version
                    breaks = 0 if file.tell() > begin else breaks + 1
                    if breaks > _MOST_BREAKS:
                        raise HubError(f"the connection broke {breaks} times: {error}") from error
                    self._keep_pace(0)
                    time.sleep(1)

    def _receive(self, file: BinaryIO, bar: Any) -> None:
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        begin = file.tell()
        # Unpacked, a small body may be a huge one.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        opening = get_session().stream("GET", self._url, headers=headers, timeout=timeout, follow_redirects=True)
        with ExitStack() as stack:
            response = _in_time(opening.__enter__)
            stack.push(opening)
            if response.status_code in (429, 503):
                wait = response.headers.get("Retry-After", "a few")
                raise HubError(f"the hub has too much to do, and asks to wait {wait:.20} seconds")
            hf_raise_for_status(response)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise HubError(f"the hub sends {self._name} compressed, which was not asked for")
            if begin and not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                # From the start, though asked for the rest.
                file.seek(0)
                file.truncate()
                bar.reset()
            for piece in response.iter_raw():
                if file.tell() + len(piece) > self._limit:
                    raise HubError(f"the hub sends more than the {self._limit:,} bytes of {self._name}")
                file.write(piece)
                bar.update(len(piece))
                if file.tell() != self._size:
                    self._keep_pace(len(piece))
        if self._size is not None and file.tell() < self._size:
            raise EOFError(f"{file.tell():,} bytes of {self._size:,} came")

    def _keep_pace(self, received: int) -> None:
        self._since += received
        now = time.monotonic()
        if now - self._mark < _PATIENCE:
            return
        if self._since < _LEAST_BYTES:
            raise HubError(f"only {self._since:,} bytes of {self._name} came in {now - self._mark:.0f} seconds")
        self._mark, self._since = now, 0
