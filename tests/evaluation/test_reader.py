"""The reader of SQuAD's JSON: what a good file gives, and what is said about a bad one."""

import gzip
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtbert.evaluation import GoldAnswer, read_squad, reader

DOCUMENT: dict[str, Any] = {
    "version": "1.1",
    "data": [
        {
            "title": "Letters",
            "paragraphs": [
                {
                    "context": "Zo\u00eb wrote it in 1843.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Who?",
                            "answers": [{"text": "Zo\u00eb", "answer_start": 0}, {"text": "it", "answer_start": 10}],
                        },
                        {"id": "q2", "question": "When?", "answers": [{"text": "1843", "answer_start": 16}]},
                    ],
                }
            ],
        },
        {
            "paragraphs": [
                {
                    "context": "b",
                    "qas": [{"id": "q3", "question": "c", "answers": [{"text": "b", "answer_start": 0}]}],
                }
            ]
        },
    ],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def write(document: Any) -> Path:
        path = tmp_path / "squad.json"
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return path

    return write


def test_read_squad_gives_every_question_in_order(write: Callable[[Any], Path]) -> None:
    questions = read_squad(write(DOCUMENT))
    assert [question.id for question in questions] == ["q1", "q2", "q3"]
    first = questions[0]
    assert (first.title, first.question, first.context) == ("Letters", "Who?", "Zo\u00eb wrote it in 1843.")
    assert first.answers == (GoldAnswer("Zo\u00eb", 0), GoldAnswer("it", 10))
    assert questions[2].title == ""


def test_read_squad_sees_gzip_by_content_whatever_the_name(write: Callable[[Any], Path]) -> None:
    plain = read_squad(write(DOCUMENT))
    assert read_squad(write(gzip.compress(json.dumps(DOCUMENT).encode()))) == plain
    assert read_squad(str(write(b"\xef\xbb\xbf" + json.dumps(DOCUMENT).encode()))) == plain


def test_whole_number_is_an_id_and_a_question_that_stands_there_twice_counts_once(write: Callable[[Any], Path]) -> None:
    document = deepcopy(DOCUMENT)
    paragraph(document)["qas"][1]["id"] = 7
    paragraph(document)["qas"].append(paragraph(document)["qas"][0])
    assert [question.id for question in read_squad(write(document))] == ["q1", "7", "q3"]


@pytest.mark.parametrize(
    ("context", "start", "known"),
    [
        ("ab 1843", 3, 3),
        ("ab 1843", 2, None),
        ("ab 1843", -4, None),
        ("ab 1843", 99, None),
        ("ab 1843", None, None),
        ("\U0001f600\U0001f600 1843", 5, 3),  # each of these is two units of UTF-16
        ("\U0001f600\U0001f600 1843", 3, 3),
        ("\U0001f600\U0001f600 1843", 4, None),
    ],
)
def test_answer_has_a_start_where_the_context_has_its_text(
    write: Callable[[Any], Path], context: str, start: int | None, known: int | None
) -> None:
    answers: list[dict[str, Any]] = [{"text": "1843", "answer_start": start}]
    if start is None:
        answers.append({"text": "1843"})
    qas = [{"id": "q", "question": "When?", "answers": answers}]
    (question,) = read_squad(write({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    assert question.answers == (GoldAnswer("1843", known),) * len(answers)


def test_read_squad_reads_the_development_set(shared_data: Path) -> None:
    questions = read_squad(shared_data / "squad" / "squad-dev-v1.1.json.gz")
    assert len(questions) == 10570
    assert len({question.title for question in questions}) == 48
    assert len({question.context for question in questions}) == 2067


QUESTION = "data[0].paragraphs[0].qas[1]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("data"), "data: missing; .* version"),
        (lambda d: d.update(data={}), "data: .* list, found an object"),
        (lambda d: d["data"].append("x"), r'data\[2\]: .* found "x"'),
        (lambda d: d["data"][0].update(title=None), r"data\[0\].title: .* found null"),
        (lambda d: d["data"][1].pop("paragraphs"), r"data\[1\].paragraphs: missing"),
        (lambda d: paragraph(d).pop("context"), r"data\[0\].paragraphs\[0\].context: missing; .* qas"),
        (lambda d: paragraph(d)["qas"][1].update(id=7.0), r"qas\[1\].id: .* found 7.0"),
        (lambda d: paragraph(d)["qas"][1].update(id=True), r"qas\[1\].id: .* found true"),
        (lambda d: paragraph(d)["qas"][1].update(id="q1"), r"qas\[1\].id: 'q1' .*qas\[0\]"),
        (lambda d: paragraph(d)["qas"][1].update(question="\ud800"), r"qas\[1\].question: .*surrogate"),
        (lambda d: paragraph(d)["qas"][1].update(answers=[]), r"qas\[1\].answers: empty"),
        (lambda d: answer(d).update(answer_start=True), "answer_start: .* found true"),
        (lambda d: answer(d).update(answer_start=1.0), "answer_start: .* found 1.0"),
        (lambda d: d.update(data=[]), "no questions"),
    ],
)
def test_read_squad_names_the_file_and_the_place(
    write: Callable[[Any], Path], change: Callable[[Any], Any], message: str
) -> None:
    document = deepcopy(DOCUMENT)
    change(document)
    path = write(document)
    with pytest.raises(ValueError, match=message) as caught:
        read_squad(path)
    assert str(caught.value).startswith(f"{path}: ")


def paragraph(document: Any) -> Any:
    return document["data"][0]["paragraphs"][0]


def answer(document: Any) -> Any:
    return paragraph(document)["qas"][1]["answers"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (gzip.compress(b" "), "empty"),
        (b'{"data": [', "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"data": "caf\xe9"}', "not UTF-8 .*byte 14 is 0xe9"),
        (b"[]", "'data', found a list"),
        (gzip.compress(b'{"data": []}' * 99)[:-9], "damaged gzip"),
        (gzip.compress(b"{}")[:5], "damaged gzip"),
        (gzip.compress(b"{}")[:10] + b"\xff" * 20, "damaged gzip"),
    ],
    ids=["empty", "blank", "cut", "deep", "latin-1", "list", "gzip cut", "gzip header", "gzip garbled"],
)
def test_read_squad_refuses_damaged_files(write: Callable[[Any], Path], content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"squad\.json: .*{message}"):
        read_squad(write(content))


def test_read_squad_says_that_a_file_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        read_squad(tmp_path / "nothing.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["data", "paragraphs", "qas", "answers", "text", "id"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_squad_raises_nothing_but_value_errors(write: Callable[[Any], Path], document: Any) -> None:
    with pytest.raises(ValueError, match=r"squad\.json: "):
        read_squad(write({"data": document}))


def test_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MOST_BYTES", 4 * 2**20)
    file = tmp_path / "squad.json.gz"
    file.write_bytes(gzip.compress(bytes(5 * 2**20)))
    with pytest.raises(ValueError, match="unpacks to more than 4,194,304 bytes"):
        read_squad(file)
