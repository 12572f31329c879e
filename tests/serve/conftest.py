"""A service around the shipped model, asked in this process, and a model that waits until it is told to go on."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from dtbert.qa import QuestionAnswerer
from dtbert.serve import Settings, create_app
from dtbert.serve.batcher import Batcher
from dtbert.serve.service import Service
from tests.qa.conftest import make_answerer, tokenizer  # noqa: F401 - fixtures

QUESTION = "Who wrote the letter?"
LETTER = "The letter was written by Ada Lovelace in 1843, and Charles Babbage answered it."


@pytest.fixture(scope="session")
def shipped() -> QuestionAnswerer:
    """The model inside dtbert, with its schedules."""
    return QuestionAnswerer.load()


class Client:
    """Asks an app without a network; several at a time where it is given several."""

    def __init__(self, service: Service) -> None:
        self.service, self.app = service, create_app(service)

    def run(self, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
        async def with_client() -> Any:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await work(client)

        return asyncio.run(with_client())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(lambda client: client.get(path, **options))

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.run(lambda client: client.post(path, json=body, **options))

    def count(self, sample: str) -> float:
        """What /metrics says of a sample, by its name and labels as they stand there; 0 where it does not stand."""
        lines = self.service.metrics.text().decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == sample), 0.0)


@pytest.fixture
def serve(shipped: QuestionAnswerer) -> Iterator[Callable[..., Client]]:
    """Makes a client of a service with some settings, around the shipped model unless it is given another."""
    services = []

    def make(qa: QuestionAnswerer = shipped, **settings: Any) -> Client:
        services.append(Service(qa, Settings(**settings), "the model"))
        return Client(services[-1])

    yield make
    for service in services:
        service.close()


@contextmanager
def held(thread: Batcher | ThreadPoolExecutor) -> Iterator[None]:
    """The thread of the model, or of the texts, is busy until this ends, so that what comes meanwhile waits."""
    begun, end = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        end.wait()

    future = thread.call(wait) if isinstance(thread, Batcher) else thread.submit(wait)
    begun.wait()
    try:
        yield
    finally:
        end.set()
        future.result()
