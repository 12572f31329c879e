"""The container, the compose file, the dashboard and the unit, held to the code as far as that goes without Docker."""

import fnmatch
import json
import re
import shlex
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from dtbert.cli import build_parser
from dtbert.serve.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each with its arguments on one line."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text("utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def last(name: str) -> str:
    return [rest for found, rest in instructions() if found == name][-1]


def served(arguments: list[str]) -> Any:
    """What `dtbert serve` makes of these arguments: it takes them all."""
    return build_parser().parse_args(arguments)


def test_the_image_is_slim_runs_as_nobody_and_listens_to_the_outside() -> None:
    known = {"FROM", "WORKDIR", "RUN", "COPY", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert {name for name, _ in instructions()} <= known
    assert all("-slim" in rest for name, rest in instructions() if name == "FROM")
    assert all("--no-cache-dir" in rest for name, rest in instructions() if name == "RUN" and "pip install" in rest)
    assert int(last("USER")) > 0
    entry = served(json.loads(last("ENTRYPOINT"))[1:])
    assert (entry.host, str(entry.port)) == ("0.0.0.0", last("EXPOSE"))


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    sources = {
        one for name, rest in instructions() if name == "COPY" and "--from" not in rest for one in rest.split()[:-1]
    }
    assert sources == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    # What makes the wheel is copied before it is made.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {project["readme"], *project["license-files"]} <= sources


def test_the_version_of_torch_is_the_constraints() -> None:
    command = next(rest for name, rest in instructions() if name == "RUN" and "download.pytorch.org" in rest)
    pattern = re.search(r"sed -n 's/\^torch==//p' ([\w.]+)", command)
    assert pattern
    assert len(re.findall(r"^torch==(.+)$", (ROOT / pattern[1]).read_text("utf-8"), re.MULTILINE)) == 1


def test_the_wheel_carries_the_pages() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]["dtbert"]
    pages = [str(path.relative_to(ROOT / "dtbert")) for path in (ROOT / "dtbert" / "serve" / "static").iterdir()]
    assert pages
    assert all(any(fnmatch.fnmatch(page, pattern) for pattern in data) for page in pages)


@pytest.fixture
def health() -> Iterator[HTTPServer]:
    class Answer(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def test_the_health_check_fails_when_the_service_does(health: HTTPServer) -> None:
    python, flag, code = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert (python, flag) == ("python", "-c")
    code = code.replace(":8000", f":{health.server_address[1]}")
    exec(code, {})
    health.RequestHandlerClass.status = 503  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="503"):
        exec(code, {})


def test_compose_starts_what_there_is_and_lets_it_drain() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]
    dtbert = compose["dtbert"]
    assert (DEPLOY / dtbert["build"] / "Dockerfile").is_file()
    options = served([*json.loads(last("ENTRYPOINT"))[1:], *dtbert["command"]])
    assert options.drain < float(dtbert["stop_grace_period"].removesuffix("s"))
    for service in compose.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert all((DEPLOY / volume.partition(":")[0]).exists() for volume in service.get("volumes", ()))
        assert re.search(r":v?\d+\.\d+\.\d+$", service.get("image", ":1.0.0"))
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text("utf-8"))["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["dtbert:8000"]


def test_the_dashboard_asks_for_counts_that_there_are() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "dtbert.json").read_text("utf-8"))
    source = yaml.safe_load(
        (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text("utf-8")
    )
    uid = source["datasources"][0]["uid"]
    metrics = Metrics()
    # Of what has labels there is nothing to see before it is counted.
    metrics.requests.labels("/v1/answer", "200").inc()
    metrics.seconds.labels("/v1/answer").observe(1)
    metrics.refused.labels("queue-full").inc()
    there = {re.split(r"[ {]", line)[0] for line in metrics.text().decode().splitlines()}
    asked = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == uid
        for target in panel["targets"]:
            asked |= set(re.findall(r"dtbert_\w+", target["expr"]))
    assert asked <= there
    kinds = {name.removesuffix("_total").removesuffix("_created") for name in there if name.startswith("dtbert_")}
    kinds = {re.sub(r"_(bucket|sum|count)$", "", name) for name in kinds}
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked} == kinds


def test_the_unit_starts_what_parses_and_waits_until_it_has_drained() -> None:
    unit = (DEPLOY / "dtbert.service").read_text("utf-8")
    fields = dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"\w+=", line))
    program, *arguments = shlex.split(fields["ExecStart"])
    assert Path(program).name == "dtbert"
    assert served(arguments).drain < float(fields["TimeoutStopSec"])


def test_the_images_python_is_one_that_dtbert_runs_on() -> None:
    versions = {rest.partition(":")[2].partition("-")[0] for name, rest in instructions() if name == "FROM"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (image,), lowest = versions, project["requires-python"].removeprefix(">=")
    assert [int(part) for part in image.split(".")] >= [int(part) for part in lowest.split(".")]
