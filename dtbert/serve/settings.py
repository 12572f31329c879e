"""What a service allows, and how it behaves under load."""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dtbert.files import naming, utf8

_LEAST_KEY = 16


@dataclass(frozen=True)
class Settings:
    """Limits of a service, and what it does when requests come faster than answers.

    Attributes:
        max_wait: seconds that a request waits for others to go through the model with it.
        max_queue: windows that may wait; from then on requests are refused until fewer do.
        shed: budgets, falling, that are used one after another as the queue fills; none by default.
        max_body: bytes of a request.
        max_context: characters of a context or question.
        max_documents: texts of a request, documents and questions alike.
        deadline: seconds that a request may take, and the most that one may ask for.
        api_keys: SHA-256 of the keys of which a request must name one; none by default.
        cors_origins: pages of other servers that may ask; none by default.
    """

    max_wait: float = 0.005
    max_queue: int = 256
    shed: tuple[float, ...] = ()
    max_body: int = 2 << 20
    max_context: int = 200_000
    max_documents: int = 100
    deadline: float = 30.0
    api_keys: tuple[bytes, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_body", "max_context", "max_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.max_wait <= 10:
            raise ValueError(f"max_wait must be from 0 to 10 seconds, not {self.max_wait}")
        if not 0 < self.deadline <= 3600:
            raise ValueError(f"deadline must be above 0 and at most 3600 seconds, not {self.deadline}")
        if list(self.shed) != sorted(set(self.shed), reverse=True):
            raise ValueError(f"shed must fall from one budget to the next, not {', '.join(map(str, self.shed))}")

    def knows(self, key: str) -> bool:
        """Whether this is one of the keys; it takes as long whichever it is, and however much of it is right."""
        digest = _digest(key)
        # Each of them is compared, whatever came before.
        return sum(hmac.compare_digest(digest, one) for one in self.api_keys) > 0


def read_api_keys(path: str | Path) -> tuple[bytes, ...]:
    """The SHA-256 of each key of a file, which has one a line; empty lines and those that begin with # are none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no key, or one that is too short or has spaces in it.
    """
    with naming(path):
        lines = (line.strip() for line in utf8(Path(path).read_bytes()).splitlines())
        return _digests(line for line in lines if line and not line.startswith("#"))


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    found = []
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"key {number} must have at least {_LEAST_KEY} letters, digits and signs of ASCII, without spaces: "
                'make one by `python -c "import secrets; print(secrets.token_urlsafe())"`'
            )
        found.append(_digest(key))
    if not found:
        raise ValueError("there is no key in it: write one a line")
    return tuple(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
