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


@pytest.mark.parametrize("title", [None, 7, ["a"]])
def test_title_that_is_no_text_is_empty(write: Callable[[Any], Path], title: Any) -> None:
    document = deepcopy(DOCUMENT)
    document["data"][0]["title"] = title
    assert read_squad(write(document))[0].title == ""


def test_read_squad_sees_gzip_by_content_whatever_the_name(write: Callable[[Any], Path]) -> None:
    plain = read_squad(write(DOCUMENT))
    assert read_squad(write(gzip.compress(json.dumps(DOCUMENT).encode()))) == plain
    assert read_squad(str(write(b"\xef\xbb\xbf" + json.dumps(DOCUMENT).encode()))) == plain


def test_whole_number_is_an_id_and_a_question_that_stands_there_twice_counts_once(write: Callable[[Any], Path]) -> None:
    document = deepcopy(DOCUMENT)
    paragraph(document)["qas"][1]["id"] = 7
    twice = deepcopy(paragraph(document)["qas"][0])
    twice["answers"][0] = {"text": "wrote", "answer_start": 4}
    paragraph(document)["qas"].append(twice)
    questions = read_squad(write(document))
    assert [question.id for question in questions] == ["q1", "7", "q3"]
    assert questions[0].answers == (GoldAnswer("Zo\u00eb", 0), GoldAnswer("it", 10), GoldAnswer("wrote", 4))


@pytest.mark.parametrize(
    ("answers", "is_impossible", "impossible"),
    [([], True, True), ([], None, True), (None, True, True), ([{"text": "it", "answer_start": 10}], True, False)],
    ids=["empty", "empty, unsaid", "missing", "as the official script"],
)
def test_question_without_answers_is_impossible(
    write: Callable[[Any], Path], answers: Any, is_impossible: bool | None, impossible: bool
) -> None:
    document = deepcopy(DOCUMENT)
    question = paragraph(document)["qas"][1]
    question.pop("answers")
    question |= {} if answers is None else {"answers": answers}
    question |= {"is_impossible": is_impossible, "plausible_answers": [{"text": "1843", "answer_start": 16}]}
    assert [one.is_impossible for one in read_squad(write(document))] == [False, impossible, False]


@pytest.mark.parametrize(
    ("context", "start", "known"),
    [
        ("ab 1843", 3, 3),
        ("1843 1843", 5, 5),
        ("1843 1843", 4, None),
        ("1843 1843", -4, None),
        ("1843 1843", 99, None),
        ("1843 1843", None, None),
        ("1843 1843", "5", None),
        ("1843 1843", 5.0, None),
        ("1843 1843", True, None),
        ("1844", 0, None),
        ("\U0001f600 1843 1843", 8, 7),  # this is two units of UTF-16
        ("\U0001f600\U0001f600 1843 1843", 9, 3),  # ... and four bytes
        ("\U0001f600\U0001f600 1843 1843", 6, None),
        # Its only place is certain, whatever the file says.
        ("ab 1843", 2, 3),
        ("ab 1843", -4, 3),
        ("ab 1843", 99, 3),
        ("ab 1843", None, 3),
        ("ab 1843", "three", 3),
    ],
)
def test_answer_has_a_start_where_the_context_has_its_text(
    write: Callable[[Any], Path], context: str, start: Any, known: int | None
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
        (lambda d: d["data"][1].pop("paragraphs"), r"data\[1\].paragraphs: missing"),
        (lambda d: paragraph(d).pop("context"), r"data\[0\].paragraphs\[0\].context: missing; .* qas"),
        (lambda d: paragraph(d)["qas"][1].update(id=7.0), r"qas\[1\].id: .* found 7.0"),
        (lambda d: paragraph(d)["qas"][1].update(id=True), r"qas\[1\].id: .* found true"),
        (lambda d: paragraph(d)["qas"][1].update(id="q1"), r"qas\[1\].id: 'q1' .*qas\[0\]"),
        (lambda d: paragraph(d)["qas"][1].update(question="\ud800"), r"qas\[1\].question: .*surrogate"),
        (lambda d: paragraph(d)["qas"][1].pop("answers"), r"qas\[1\].answers: missing"),
        (lambda d: paragraph(d)["qas"][1].update(answers=None), r"qas\[1\].answers: .* found null"),
        (lambda d: answer(d).pop("text"), r"answers\[0\].text: missing"),
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
