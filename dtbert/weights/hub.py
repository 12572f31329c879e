"""Where a checkpoint lies: inside the package, on the disk, or on the Hugging Face hub."""

import errno
import logging
import re
from os import PathLike
from pathlib import Path

from dtbert.files import first_line
from dtbert.weights.checkpoint import TOKENIZER_FILES, WEIGHT_FILES, shard_names
from dtbert.weights.download import HubError, ask, check_revision, download, note_absent, note_commit
from dtbert.weights.pooling import MODULES_FILE, POOLING_FILE

SHIPPED = Path(__file__).parent / "shipped"

# What was measured of a model, and is read beside its weights.
MEASURED_FILES = ("schedules.json", "cascade.json", "no_answer.json")
# What is downloaded beside config and weights, and nothing else.
_COMPANIONS = (*TOKENIZER_FILES, *MEASURED_FILES, MODULES_FILE)
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")

# What a disk answers that is full, or not to be written.
_DISK_ERRORS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
)

logger = logging.getLogger(__name__)


def resolve_source(source: str | PathLike[str] | None, revision: str | None = None) -> Path:
    """The local folder or file of a checkpoint, downloaded first if it is on the hub.

    Args:
        source: a folder or file, or a hub id, ``name`` or ``org/name``; what exists on the disk is local. None is the
            model inside the package.
        revision: branch, tag or commit of a hub id; its main branch by default.

    Raises:
        FileNotFoundError: nothing is there, on the disk or on the hub.
        OSError: the hub cannot be reached and its cache does not hold the model, or a download broke off.
        ValueError: neither a path nor a hub id, or a revision that can be none, or of something not on the hub.
        TypeError: not a string or path.
    """
    if not isinstance(source, str | PathLike | None):
        raise TypeError(f"source must be a path or a hub id, not {type(source).__name__}")
    if isinstance(source, str) and not source.strip():
        raise ValueError("source is an empty string: give a path or a hub id, or None for the model in the package")
    path = SHIPPED if source is None else Path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for models on the hub: {path} is on this disk")
        return path
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source) or path.suffix in (".safetensors", ".bin", ".json"):
        raise FileNotFoundError(
            f"no such file or folder: {str(source)!r} (looked for {path.absolute()}); a model on the hub is named "
            "'name' or 'org/name'"
        )
    return _download(source, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    """The folder of the hub's cache that holds the checkpoint.

    The cache is huggingface_hub's, which obeys HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
    """
    # Imported here: whoever loads from the disk need not wait for it.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

    check_revision(revision)
    commit, unreachable = "", None
    # Asked once: huggingface_hub would retry for half a minute before it says that there is no network.
    try:
        commit = ask(repo_id, "config.json", revision).commit
    except HubError:
        raise
    except Exception as error:  # the transport's errors differ from version to version
        refusal = _refusal(error, repo_id, revision)
        if refusal is not None and (isinstance(error, EntryNotFoundError) or not _is_cached(repo_id, revision)):
            raise refusal from error
        unreachable = error

    def fetch(name: str) -> Path | None:
        try:
            return download(repo_id, name, ask(repo_id, name, commit), weights=name.endswith((".safetensors", ".bin")))
        except EntryNotFoundError:
            note_absent(repo_id, name, commit)
            return None
        except Exception as error:
            raise _broke_off(name, repo_id, error) from error

    if unreachable is not None:
        # The cache knows which commit the revision was.
        try:
            commit = Path(hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=True)).parent.name
        except EntryNotFoundError as error:
            raise _no_network(repo_id, unreachable) from error
        if not isinstance(unreachable, OfflineModeIsEnabled):
            happened = "cannot reach the hub" if _refusal(unreachable, repo_id, revision) is None else "the hub refuses"
            logger.warning("%s (%s): using the copy of %s in its cache", happened, _reason(unreachable), repo_id)
    else:
        note_commit(repo_id, revision, commit)

    # All files come from the same commit, even if the branch moves meanwhile; what is cached of it needs no request.
    def fetch_once(name: str) -> Path | None:
        cached = try_to_load_from_cache(repo_id, name, revision=commit)
        if cached is None:
            return fetch(name) if unreachable is None else None
        return Path(cached) if isinstance(cached, str) else None  # the cache knows that there is none

    config = fetch_once("config.json")
    if config is None:
        raise _no_network(repo_id, unreachable)
    weights = next((path for path in map(fetch_once, WEIGHT_FILES) if path is not None), None)
    if weights is None:
        if unreachable is not None:
            raise _no_network(repo_id, unreachable)
        raise FileNotFoundError(f"{repo_id!r} on the hub has no weights: looked for {', '.join(WEIGHT_FILES)}")
    if weights.name.endswith(".index.json"):
        for name in sorted(set(shard_names(weights).values())):
            if fetch_once(name) is None:
                if unreachable is not None:
                    raise _no_network(repo_id, unreachable)
                raise FileNotFoundError(f"{repo_id!r} on the hub has no {name}, which its {weights.name} lists")
    if not weights.name.startswith(WEIGHT_FILES[0]):
        logger.warning("%s has no %s at this revision: using %s", repo_id, WEIGHT_FILES[0], weights.name)
    fetched = {name: fetch_once(name) for name in _COMPANIONS}
    if fetched[MODULES_FILE] is not None:
        fetch_once(POOLING_FILE)
    return config.parent


def _refusal(error: Exception, repo_id: str, revision: str | None) -> OSError | None:
    """What to say if the hub answered, and the answer was no; None if there was no answer."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return OSError(f"{repo_id!r} asks you to accept its terms on the hub, then to log in: `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"no model {repo_id!r} on the hub, or it is private, and no such file or folder here{_near(repo_id)}; "
            "check the name, or log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id!r} on the hub has no revision {revision!r}")
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(f"{repo_id!r} on the hub has no config.json: it is not a BERT's checkpoint")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return OSError(
            f"the hub refuses {repo_id!r} ({_reason(error)}): log in with `hf auth login`, or leave HF_TOKEN out where "
            "it is not valid any more"
        )
    return None


def _is_cached(repo_id: str, revision: str | None) -> bool:
    """Whether the cache holds the model, as far as its names tell."""
    from huggingface_hub import try_to_load_from_cache

    def has(name: str) -> bool:
        return isinstance(try_to_load_from_cache(repo_id, name, revision=revision), str)

    return has("config.json") and any(map(has, WEIGHT_FILES))


def _broke_off(name: str, repo_id: str, error: Exception) -> OSError:
    from huggingface_hub import constants

    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return OSError(
            f"cannot write {name} of {repo_id!r} to the cache {constants.HF_HUB_CACHE}: {error}; make room or give "
            "yourself the right to write there, or set HF_HOME to another folder"
        )
    return OSError(f"the download of {name} of {repo_id!r} broke off: {error}; load it again")


def _reason(error: Exception) -> str:
    """The first line of an error, without the address and the number of the request."""
    return first_line(error).partition(" (Request ID")[0].rstrip(" .")


def _near(repo_id: str) -> str:
    """What is known of a path that was perhaps meant."""
    path = Path(repo_id)
    return (
        f" (the folder {path.parent} is here, without {path.name})" if path.parent.name and path.parent.is_dir() else ""
    )


def _no_network(repo_id: str, error: Exception | None) -> OSError:
    from huggingface_hub import constants

    reason = _reason(error) if error else "no answer"
    return OSError(
        f"cannot reach {constants.ENDPOINT} for {repo_id!r} ({reason}), its cache {constants.HF_HUB_CACHE} does not "
        f"hold the model, and there is no such file or folder here{_near(repo_id)}. "
        f"Ways to get weights without a network:\n"
        f"  - the model inside the package: give no source\n"
        f"  - a local folder with config.json and weights: give its path\n"
        f"  - on a machine with a network, `hf download {repo_id} --exclude training_args.bin --local-dir FOLDER` "
        f"(older: `huggingface-cli download`); copy FOLDER here and give its path\n"
        f"  - a filled cache of such a machine: copy it here, and set HF_HOME to it and HF_HUB_OFFLINE=1"
    )
