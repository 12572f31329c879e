"""A Hugging Face hub on loopback: one repository, the routes that a download needs; it may break off, or be hostile."""

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from urllib.parse import unquote


@dataclass
class Hub:
    """What the server serves, and what it was asked.

    Attributes:
        repo: the id of the one repository.
        revisions: for each branch, the files by name.
        cuts: for each file, after how many bytes of the body the connection drops; once per entry.
        refuse: a status and an error code with which every request is answered.
        lies: for each method and file, headers that replace the true ones.
        busy: headers with which downloads are put off, with status 429.
        drip: seconds between the bytes of a body.
        stall: seconds before an answer begins, for each method.
        requests: method, file and Range header of each request.
    """

    repo: str
    revisions: dict[str, dict[str, bytes]]
    cuts: dict[str, list[int]] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None
    lies: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    busy: dict[str, str] | None = None
    drip: float = 0.0
    stall: dict[str, float] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, revision: str) -> str:
        return hashlib.sha1(revision.encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        return next((files for name, files in self.revisions.items() if revision in (name, self.commit(name))), None)

    def asked(self, method: str) -> list[str]:
        return [name for how, name, _ in self.requests if how == method]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a free port until the block ends."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub = self.served
        if "/resolve/" not in self.path:  # huggingface_hub looks for other services too; they do not matter here
            return self._refuse(404, "NoSuchService")
        # /org/name/resolve/revision/file, where a revision such as refs/pr/2 comes quoted
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        revision = unquote(revision)
        hub.requests.append((self.command, name, self.headers.get("Range")))
        files = hub.files(revision)
        time.sleep(hub.stall.get(self.command, 0))
        if hub.refuse is not None:
            return self._refuse(*hub.refuse)
        if unquote(repo) != hub.repo:
            return self._refuse(404, "RepoNotFound")
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        commit = revision if revision not in hub.revisions else hub.commit(revision)
        if name not in files:
            return self._refuse(404, "EntryNotFound", commit)
        content = files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if hub.busy is not None and self.command == "GET":
            return self._refuse(429, "TooManyRequests", headers=hub.busy)
        self.send_response(206 if start else 200)
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Content-Length": str(len(content) - start),
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for header in (headers | hub.lies.get((self.command, name), {})).items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "HEAD":
            return None
        cuts = hub.cuts.get(name)
        if cuts:
            self.wfile.write(content[start : cuts.pop(0)])
            self.close_connection = True
        elif hub.drip:
            with suppress(OSError):  # whoever asked has given up
                for place in range(start, len(content)):
                    self.wfile.write(content[place : place + 1])
                    time.sleep(hub.drip)
        else:
            self.wfile.write(content[start:])
        return None

    def _refuse(
        self, status: int, code: str, commit: str | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()
