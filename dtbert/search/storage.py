"""Where a study lives: any storage of Optuna's, opened by several processes at once, with its sampler."""

import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna import Study
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from dtbert.files import differing, first_line, lock

SamplerName = Literal["nsga2", "tpe"]

_POPULATION = 32
_SQLITE_PATIENCE = 60  # seconds that a process waits for another one's write
_LOCK_PATIENCE = 5.0  # ... and for the lock of a folder, under which tables are made

# What a storage raises that fails.
STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)

logger = logging.getLogger(__name__)


def open_study(storage: str | None, name: str, settings: dict[str, Any], sampler: SamplerName, seed: int) -> Study:
    """The study of a name, made if it is not there.

    Args:
        storage: an Optuna URL such as that of `sqlite_url`; None keeps the study in memory.
        settings: plain values on which the trials depend; a study is of one such set.
        sampler: ``"nsga2"``, an evolution, or ``"tpe"``, Bayesian.
        seed: of the sampler; each of several processes needs its own.

    Raises:
        ValueError: the storage cannot be opened, or holds a study of that name with other settings.
    """
    place = "memory" if storage is None else without_password(storage)
    try:
        study = optuna.create_study(
            storage=None if storage is None else _open_storage(storage),
            study_name=name,
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )
    except Exception as error:  # the errors of the storages have nothing in common
        reason = first_line(error).replace(storage or "memory", place)
        raise ValueError(f"cannot open the study {name!r} in {place}: {reason}") from error
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("settings", settings)
    elif before != settings:
        raise ValueError(
            f"the study {name!r} in {place} was made with other settings "
            f"({', '.join(differing(before, settings))}): name another one"
        )
    # A continued search must not repeat the draws it began with.
    number = int(np.random.SeedSequence([seed, len(study.get_trials(deepcopy=False))]).generate_state(1)[0])
    if sampler == "nsga2":
        study.sampler = optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=number)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Layers matter together: what the first one drops the last one cannot use. Each kind of policy is a group.
            study.sampler = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=number)
    return study


def sqlite_url(file: Path) -> str:
    """The URL of a study in a file of SQLite's."""
    return URL.create("sqlite", database=str(file)).render_as_string()


@contextmanager
def naming_storage(storage: str) -> Iterator[None]:
    """Say in one line what goes wrong with a study while it is used: the disk is full, the database has gone.

    Raises:
        OSError: the storage fails; the message names it.
    """
    try:
        yield
    except STORAGE_ERRORS as error:
        # The reason is the database's, behind what Optuna makes of it.
        reason = first_line(error.__cause__ or error)
        raise OSError(
            f"the study in {without_password(storage)} cannot be read or written any more ({reason}): "
            "see to it, then the same command goes on"
        ) from error


def without_password(url: str) -> str:
    """A storage's URL as it may be shown."""
    # By hand, for one that is wrong is shown, too.
    masked = re.sub(r"^([^/@]*(?://)?[^:/@]*):[^/]*@", r"\1:***@", url)
    return re.sub(r"([?&](?:password|passwd|pwd|token|sslpassword)=)[^&]*", r"\1***", masked, flags=re.IGNORECASE)


def _open_storage(url: str) -> BaseStorage:
    if not url.startswith("sqlite"):
        return get_storage(url)
    with _folder_lock(Path(make_url(url).database or "").absolute().parent):
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _SQLITE_PATIENCE}})


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time make its tables: two at once would be in each other's way.

    Whoever may read a folder may lock it, for ever: this one waits for a while.
    """
    with ExitStack() as opened:
        with suppress(OSError):  # there is none, or on Windows, where no folder can be opened
            descriptor = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            began = time.monotonic()
            while not lock(descriptor) and time.monotonic() - began < _LOCK_PATIENCE:
                time.sleep(0.02)
            if time.monotonic() - began >= _LOCK_PATIENCE:
                logger.warning("another process has locked the folder %s: going on without that lock", folder)
        yield
