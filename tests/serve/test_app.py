"""The service over HTTP, in this process: answers as the answerer's, problems that say what to do, limits, load."""

import asyncio
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from dtbert.model import LengthSchedule, TopP
from dtbert.qa import QuestionAnswerer
from dtbert.serve import problems
from dtbert.serve.settings import Settings, read_api_keys
from tests.serve.conftest import LETTER, QUESTION, Client, held

Serve = Callable[..., Client]
ASK = {"question": QUESTION, "context": LETTER}
KEY = "a-key-of-the-tests-0123"


def fields(answer: Any, document: str | None = None) -> dict[str, Any]:
    named = {name: getattr(answer, name) for name in ("text", "start", "end", "score", "margin")}
    return {**named, "document": document}


def problem(response: httpx.Response, name: str) -> dict[str, Any]:
    """The problem document of a response, which must be of this kind."""
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    kind = problems.KINDS[name]
    assert (document["type"], document["title"], document["status"], document["advice"]) == (
        f"/problems#{name}",
        kind.title,
        kind.status,
        kind.advice,
    )
    assert response.status_code == kind.status
    assert document["detail"]
    return document


def test_an_answer_is_the_answerers(serve: Serve, shipped: QuestionAnswerer) -> None:
    client = serve()
    got = client.post("/v1/answer", {**ASK, "top_k": 3, "budget": 0.5}).json()
    assert got["answers"] == [fields(one) for one in shipped.top(QUESTION, LETTER, 3, budget=0.5)]
    schedule = shipped.within_budget(0.5).schedule
    assert schedule is not None
    used = got["used"]
    assert (used["budget"], used["schedule"], used["shed"]) == (0.5, schedule.to_dict(), False)
    assert used["work"] == pytest.approx(shipped.trace(QUESTION, LETTER, schedule=schedule).work)
    assert 0 < used["waited_ms"] < used["total_ms"]
    for bound in (0.5, 0.6):  # a short text may cost a little more than the mean
        assert client.count(f'dtbert_budget_used_bucket{{le="{bound}"}}') == (used["work"] <= bound)


def test_a_schedule_may_be_given_as_an_object_or_a_list(serve: Serve, shipped: QuestionAnswerer) -> None:
    client = serve()
    schedule = LengthSchedule.ratios([1, 1, 0.9, 0.6, 0.4, 0.2])
    expected = [fields(shipped(QUESTION, LETTER, schedule=schedule))]
    for given in (schedule.to_dict(), list(schedule.length_config)):
        assert client.post("/v1/answer", {**ASK, "schedule": given}).json()["answers"] == expected
    tokens = LengthSchedule.absolute([17, 15, 12, 9, 7, 5])
    expected = [fields(shipped(QUESTION, LETTER, schedule=tokens))]
    assert client.post("/v1/answer", {**ASK, "schedule": list(tokens.length_config)}).json()["answers"] == expected


def test_a_policy_whose_work_is_the_texts_tells_it(serve: Serve, shipped: QuestionAnswerer) -> None:
    policy = TopP((1, 0.9, 0.8, 0.7, 0.6, 0.5), scorer="received", keep_question=True)
    long = " ".join(["Nothing of note was written on that day."] * 80 + [LETTER])
    for context in (LETTER, long):
        body = {"question": QUESTION, "context": context, "schedule": policy.to_dict()}
        got = serve().post("/v1/answer", body).json()
        assert got["answers"] == [fields(shipped(QUESTION, context, schedule=policy))]
        assert got["used"]["work"] == pytest.approx(shipped.trace(QUESTION, context, schedule=policy).work)


def test_several_documents_have_one_ranking(serve: Serve, shipped: QuestionAnswerer) -> None:
    texts = {"a": "Nobody came in 1901.", "1": LETTER, "c": "Zoe wrote a novel."}
    documents = [{"name": "a", "text": texts["a"]}, {"text": texts["1"]}, {"name": "c", "text": texts["c"]}]
    body = {"question": QUESTION, "documents": documents, "top_k": 4, "no_answer": True, "threshold": 3}
    got = serve().post("/v1/answer", body).json()["answers"]
    expected = shipped.answer_documents(QUESTION, texts, 4, no_answer=True, threshold=3)
    assert got == [fields(one.answer, one.document) for one in expected]


def test_many_questions_keep_their_order_and_their_errors(serve: Serve, shipped: QuestionAnswerer) -> None:
    pairs = [(QUESTION, LETTER), ("When?", LETTER), (" ", LETTER), ("Who answered?", LETTER)]
    body = {"questions": [{"id": n, "question": question, "context": text} for n, (question, text) in enumerate(pairs)]}
    got = serve().post("/v1/answers", body).json()["results"]
    assert [one["id"] for one in got] == [0, 1, 2, 3]
    assert [bool(one["answers"]) for one in got] == [True, True, False, True]
    assert got[2]["error"] == "the question is blank: give it at least one word"
    assert got[1]["answers"] == [fields(shipped("When?", LETTER))]


def test_a_trace_is_the_answerers(serve: Serve, shipped: QuestionAnswerer) -> None:
    got = serve().post("/v1/trace", {**ASK, "budget": 0.3}).json()
    assert got["trace"] == httpx.Response(200, json=shipped.trace(QUESTION, LETTER, budget=0.3).to_dict()).json()
    assert got["used"]["budget"] == 0.3


def test_the_model_tells_its_front_and_limits(serve: Serve, shipped: QuestionAnswerer) -> None:
    got = serve(max_context=1234).get("/v1/model").json()
    assert shipped.front is not None
    assert [one["work"] for one in got["front"]] == [one.macs_fraction for one in shipped.schedules] + [1.0]
    assert got["limits"]["max_context"] == 1234
    assert (got["layers"], got["window"]) == (6, 384)
    assert got["measured_on"] == f"{shipped.front.num_questions} questions of {shipped.front.questions_file}"


@pytest.mark.parametrize(
    ("body", "name", "detail"),
    [
        ({**ASK, "top": 3}, "invalid-request", "^/top: there is no such field"),
        ({"question": QUESTION}, "invalid-request", "give either `context`.* or `documents`"),
        ({**ASK, "documents": [{"text": "a"}]}, "invalid-request", "give either"),
        ({**ASK, "top_k": 0}, "invalid-request", "^/top_k: .*greater than or equal to 1"),
        ({**ASK, "top_k": True}, "invalid-request", "^/top_k: "),
        ({**ASK, "budget": "0.5"}, "invalid-request", "^/budget: "),
        ({**ASK, "deadline_ms": True}, "invalid-request", "^/deadline_ms: "),
        ({**ASK, "schedule": 7}, "invalid-request", "^/schedule: .*dictionary"),
        ({**ASK, "schedule": ["0.9", True]}, "invalid-request", "^/schedule"),
        ({**ASK, "deadline_ms": 30_001}, "invalid-request", "^/deadline_ms: 30001 ms are more than .* 30000"),
        ({"question": QUESTION, "documents": [{"text": 7}]}, "invalid-request", "^/documents/0/text: "),
        ({"question": QUESTION, "documents": [{"text": LETTER, "name": "\ud800"}]}, "invalid-request", "surrogate"),
        ({**ASK, "question": ""}, "cannot-answer", "the question is empty: give it at least one word"),
        ({**ASK, "question": "\ud800"}, "cannot-answer", "surrogate"),
        ({"question": QUESTION, "documents": [{"text": LETTER}, {"name": "b", "text": " "}]}, "cannot-answer", "'b'"),
        ({**ASK, "budget": 0.01}, "cannot-answer", "below the cheapest schedule"),
        ({**ASK, "budget": 0.5, "schedule": [1] * 6}, "cannot-answer", "exclude each other"),
        ({**ASK, "schedule": [1, 0.5]}, "cannot-answer", "the schedule has 2 entries, the model 6 layers"),
        ({**ASK, "schedule": {"kind": "odd"}}, "cannot-answer", "kind must be one of absolute, .* not 'odd'"),
        ({**ASK, "threshold": 1.5}, "cannot-answer", "give no_answer=True with it"),
        ({**ASK, "context": "a " * 600}, "too-large", "1,200 characters, this service takes 1,000"),
        ({"question": QUESTION, "documents": [{"text": "a"}] * 5}, "too-large", "5 texts, this service takes 4"),
        ({**ASK, "context": "a" * 9000}, "too-large", r"the body has 9,\d+ bytes, this service takes 5,000"),
    ],
)
def test_what_is_wrong_is_a_problem_document(serve: Serve, body: dict[str, Any], name: str, detail: str) -> None:
    client = serve(max_context=1000, max_documents=4, max_body=5000)
    found = problem(client.run(lambda http: http.post("/v1/answer", **_json(body))), name)
    assert re.search(detail, found["detail"]), found["detail"]
    assert ("errors" in found) == (name == "invalid-request")
    assert client.count(f'dtbert_requests_total{{endpoint="/v1/answer",status="{found["status"]}"}}') == 1


def _json(body: Any) -> dict[str, Any]:
    # As other clients write it: with escapes for half characters, which httpx itself refuses.
    return {"content": json.dumps(body).encode(), "headers": {"Content-Type": "application/json"}}


def test_a_pointer_names_a_place_in_the_body(serve: Serve) -> None:
    body = {
        "questions": [{**ASK, "id": True}, {**ASK, "id": "\ud800"}, {"question": ""}],
        "schedule": {"a": 1},
        "b/~": 1,
    }
    found = problem(serve().run(lambda http: http.post("/v1/answers", **_json(body))), "invalid-request")
    places = {one["pointer"] for one in found["errors"]}
    assert places == {"/questions/0/id", "/questions/1/id", "/questions/2/context", "/b~1~0"}


def test_bodies_without_a_length_are_bounded_too(serve: Serve) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 1000

    client = serve(max_body=5000)
    headers = {"Content-Type": "application/json"}
    response = client.run(lambda http: http.post("/v1/answer", content=chunks(), headers=headers))
    assert "the body is longer" in problem(response, "too-large")["detail"]
    assert client.count('dtbert_refused_total{problem="too-large"}') == 1


def test_a_body_is_not_waited_for_for_ever(serve: Serve) -> None:
    async def chunks() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    client, headers = serve(deadline=0.05), {"Content-Type": "application/json"}
    response = client.run(lambda http: http.post("/v1/answer", content=chunks(), headers=headers))
    assert problem(response, "too-late")["detail"] == "the body was not there within 0.05 s"
    assert client.count('dtbert_refused_total{problem="too-late"}') == 1


def test_other_mistakes_are_problems_too(serve: Serve) -> None:
    client = serve()
    assert "GET /v1/nothing" in problem(client.get("/v1/nothing"), "not-found")["detail"]
    wrong = client.get("/v1/answer")
    problem(wrong, "wrong-method")
    assert wrong.headers["allow"] == "POST"
    for content in (b"{", b"\xff", b""):
        response = client.run(
            lambda http, content=content: http.post(
                "/v1/answer", content=content, headers={"Content-Type": "application/json"}
            )
        )
        assert response.status_code in (400, 422)
        assert response.headers["content-type"] == "application/problem+json"
    # A form of another page cannot ask: what it sends is no JSON.
    plain = client.run(lambda http: http.post("/v1/answer", content=b'{"question": "x", "context": "y"}'))
    assert plain.status_code == 422
    counted = ("not-found", "wrong-method", "unreadable", "invalid-request")
    assert [client.count(f'dtbert_refused_total{{problem="{name}"}}') for name in counted] == [1, 1, 2, 2]


def test_a_defect_is_a_problem_without_its_inside(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()

    def fail() -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(client.service, "model", fail)
    assert "secret" not in str(problem(client.get("/v1/model"), "defect"))
    assert client.count('dtbert_requests_total{endpoint="/v1/model",status="500"}') == 1
    assert client.count('dtbert_refused_total{problem="defect"}') == 1


def test_each_kind_of_problem_is_explained(serve: Serve) -> None:
    page = serve().get("/problems").text
    assert all(f'id="{name}"' in page for name in problems.KINDS)


def test_keys_are_asked_for_where_there_are_some(serve: Serve, tmp_path: Any) -> None:
    (tmp_path / "keys").write_text(KEY)
    client = serve(api_keys=read_api_keys(tmp_path / "keys"))
    for path in ("/v1/model", "/metrics"):
        refused = client.get(path)
        assert "Authorization is missing" in problem(refused, "no-key")["detail"]
        assert refused.headers["www-authenticate"] == "Bearer"
        for wrong in (f"Bearer {KEY}x", f"Basic {KEY}", "Bearer", KEY):
            problem(client.get(path, headers={"Authorization": wrong}), "no-key")
        assert client.get(path, headers={"Authorization": f"bearer {KEY}"}).status_code == 200
    assert client.count('dtbert_refused_total{problem="no-key"}') == 10
    # Before the body is read, of whatever kind it is.
    problem(client.post("/v1/answer", {"wrong": 1}), "no-key")
    for path in ("/", "/docs", "/openapi.json", "/health/ready"):
        assert client.get(path).status_code == 200
    spec = client.get("/openapi.json").json()
    assert spec["paths"]["/v1/answer"]["post"]["security"] == [{"key": []}]


def test_other_origins_may_ask_only_if_they_are_named(serve: Serve) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "content-type"
    options = {"headers": asked}
    closed = serve().run(lambda http: http.options("/v1/answer", **options))
    assert "access-control-allow-origin" not in closed.headers
    opened = serve(cors_origins=("https://page.example",)).run(lambda http: http.options("/v1/answer", **options))
    assert opened.headers["access-control-allow-origin"] == "https://page.example"


def test_pages_load_nothing_from_elsewhere(serve: Serve) -> None:
    client = serve()
    for path in ("/", "/docs", "/problems"):
        page = client.get(path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert loaded
        assert all(one.startswith("/") and client.get(one).status_code == 200 for one in loaded)
        assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", page.text)


def test_openapi_examples_are_answered(serve: Serve) -> None:
    client = serve()
    spec = client.get("/openapi.json").json()
    posted = {path: one["post"] for path, one in spec["paths"].items() if "post" in one}
    assert posted.keys() == {"/v1/answer", "/v1/answers", "/v1/trace"}
    for path, one in posted.items():
        name = one["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        examples = spec["components"]["schemas"][name]["examples"]
        assert examples
        for example in examples:
            assert client.post(path, {**example, "deadline_ms": 30000}).status_code == 200, example
    assert "ProblemDocument" in spec["components"]["schemas"]


@pytest.mark.parametrize("busy", ["batcher", "_texts"])
def test_a_full_queue_refuses_at_once_and_says_when_to_ask_again(serve: Serve, busy: str) -> None:
    client = serve(max_queue=2)

    async def crowd(http: httpx.AsyncClient) -> list[httpx.Response]:
        with held(getattr(client.service, busy)):
            asks = [asyncio.ensure_future(http.post("/v1/answer", json=ASK)) for _ in range(6)]
            # The refused ones are done while the thread is still busy with something else.
            refused, waiting = await _first_done(asks, 4)
        return [*refused, *(await asyncio.gather(*waiting))]

    responses = client.run(crowd)
    for response in responses[:4]:
        problem(response, "queue-full")
        assert int(response.headers["retry-after"]) >= 1
    assert [response.status_code for response in responses[4:]] == [200, 200]
    assert client.count('dtbert_refused_total{problem="queue-full"}') == 4


async def _first_done(tasks: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    while sum(task.done() for task in tasks) < count:
        await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    return [task.result() for task in tasks if task.done()], [task for task in tasks if not task.done()]


def test_under_load_budgets_shrink_and_the_response_says_so(serve: Serve) -> None:
    client = serve(max_queue=6, shed=(0.5,))
    # From half of the queue on: those who asked for less, or for a schedule of their own, get what they asked for.
    bodies = [ASK, ASK, ASK, ASK, {**ASK, "budget": 0.3}, {**ASK, "schedule": [1, 1, 0.9, 0.6, 0.4, 0.2]}]

    async def crowd(http: httpx.AsyncClient) -> list[Any]:
        asks = []
        with held(client.service.batcher):
            for waiting, body in enumerate(bodies):
                asks.append(asyncio.ensure_future(http.post("/v1/answer", json=body)))
                while client.service.batcher.waiting <= waiting:
                    await asyncio.sleep(0)
        return [one.json()["used"] for one in await asyncio.gather(*asks)]

    used = [(one["budget"], one["shed"]) for one in client.run(crowd)]
    assert used == [(None, False)] * 3 + [(0.5, True), (0.3, False), (None, False)]
    assert client.count("dtbert_shed_total") == 1
    assert client.post("/v1/answer", ASK).json()["used"]["shed"] is False


def test_budgets_to_shed_to_must_be_the_models(serve: Serve, make_answerer: Callable[..., QuestionAnswerer]) -> None:
    with pytest.raises(ValueError, match="below the cheapest schedule"):
        serve(shed=(0.01,))
    with pytest.raises(ValueError, match=r"no schedules\.json"):
        serve(make_answerer(), shed=(0.5,))


@pytest.mark.parametrize("busy", ["batcher", "_texts"])
def test_a_request_ends_at_its_deadline_and_is_not_read(serve: Serve, busy: str) -> None:
    client = serve()
    with held(getattr(client.service, busy)):
        late = problem(client.post("/v1/answer", {**ASK, "deadline_ms": 50}), "too-late")
        assert late["detail"] == "there was no answer within 0.05 s"
        assert client.service.batcher.waiting == 0
    client.service.close()
    assert client.count("dtbert_batch_windows_total") == 0
    assert client.count("dtbert_dropped_total") == 1


def test_a_service_that_ends_is_not_ready(serve: Serve) -> None:
    client = serve()
    assert client.get("/health/ready").json() == {"status": "ok"}
    client.service.close()
    for response in (client.get("/health/ready"), client.post("/v1/answer", ASK)):
        problem(response, "ending")
    assert client.get("/health/live").status_code == 200


def test_settings_are_plain_values_for_another_process() -> None:
    settings = Settings(shed=(0.5,), cors_origins=("https://page.example",))
    assert pickle.loads(pickle.dumps(settings)) == settings
