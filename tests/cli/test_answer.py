"""`dtbert answer` for one question."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.cli.answer import excerpt
from dtbert.qa import QuestionAnswerer
from tests.cli.conftest import Run

CONTEXT = "Ada wrote the letter in London. Zoe said it in 1995, and Ada said it in 1843."


def test_answer_prints_the_models_answer_with_its_place(run: Run, model_folder: Path) -> None:
    status, out, err = run("answer", "--question", "Who wrote it?", "--context", CONTEXT, "--model", model_folder)
    answer = QuestionAnswerer.load(model_folder)("Who wrote it?", CONTEXT)
    assert (status, err) == (0, "")
    first, second, third = out.splitlines()
    assert first == answer.text
    assert second == f"   score {answer.score:.3g}, characters {answer.start} to {answer.end}"
    assert f"[{answer.text}]" in third


def test_answer_as_json_holds_the_top_answers_best_first(run: Run, model_folder: Path) -> None:
    arguments = ("answer", "--question", "Who?", "--context", CONTEXT, "--model", model_folder, "--json")
    best = json.loads(run(*arguments).out)
    assert best.keys() == {"answer", "start", "end", "score", "margin"}
    assert best["answer"] == CONTEXT[best["start"] : best["end"]]
    three = json.loads(run(*arguments, "--top", 3).out)
    assert three["answers"][0] == best == {name: three[name] for name in best}
    margins = [answer["margin"] for answer in three["answers"]]
    assert margins == sorted(margins, reverse=True)
    assert sum(answer["score"] for answer in three["answers"]) < 1
    assert len({answer["answer"] for answer in three["answers"]}) == 3


def test_answer_numbers_the_top_answers(run: Run, model_folder: Path) -> None:
    out = run("answer", "--question", "Who?", "--context", CONTEXT, "--model", model_folder, "--top", 2).out
    assert [line[:3] for line in out.splitlines() if not line.startswith(" ")] == ["1. ", "2. "]


def test_best_of_several_contexts_is_printed_with_its_name(run: Run, model_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"\xef\xbb\xbf" + CONTEXT.encode())  # a mark that offsets do not count
    second.write_text("Zoe said it.")
    arguments = ("answer", "--question", "Who?", "--context", first, second, "--model", model_folder, "--top", 3)
    documents = {str(first): CONTEXT, str(second): "Zoe said it."}
    expected = QuestionAnswerer.load(model_folder).answer_documents("Who?", documents, 3)
    found = json.loads(run(*arguments, "--json").out)["answers"]
    assert [(one["document"], one["answer"], one["start"]) for one in found] == [
        (name, answer.text, answer.start) for name, answer in expected
    ]
    assert [line for line in run(*arguments).out.splitlines() if line.endswith(tuple(documents))] == [
        f"   score {answer.score:.3g}, characters {answer.start} to {answer.end} of {name}" for name, answer in expected
    ]


def test_answer_may_be_that_there_is_none(run: Run, model_folder: Path) -> None:
    arguments = ("answer", "--question", "Who?", "--context", CONTEXT, "--model", model_folder)
    first, second = run(*arguments, "--no-answer", "--threshold", 1e6).out.splitlines()
    assert first == "(no answer)"
    assert second.startswith("   score ")
    assert "characters" not in second
    always = run(*arguments)
    assert run(*arguments, "--no-answer", "--threshold", -1e6) == always
    assert "give --no-answer with it" in run(*arguments, "--threshold", 1).err


def test_answer_options_reach_the_answerer(run: Run, model_folder: Path) -> None:
    arguments = ("answer", "--question", "Who?", "--context", CONTEXT, "--model", model_folder, "--json", "--top", 99)
    short = json.loads(run(*arguments, "--max-answer-tokens", 1, "--overlap").out)["answers"]
    assert all(len(answer["answer"].split()) == 1 for answer in short)
    apart, overlapping = (json.loads(run(*arguments, *more).out)["answers"] for more in ((), ("--overlap",)))
    assert len(apart) < len(overlapping)


def test_answer_depends_on_the_schedule(run: Run, model_folder: Path) -> None:
    arguments = ("answer", "--question", "Who?", "--context", CONTEXT, "--model", model_folder, "--json")
    whole, ones, few = (run(*arguments, *more) for more in ((), ("--schedule", "1,1"), ("--schedule", "5,2")))
    assert whole.out == ones.out
    assert json.loads(whole.out)["score"] != json.loads(few.out)["score"]


def test_answer_of_the_shipped_model_is_right(run: Run) -> None:
    status, out, _ = run("answer", "--question", "Who wrote it?", "--context", "It was written by Ada Lovelace.")
    assert status == 0
    assert out.startswith("Ada Lovelace\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--question and --context (or --file, --text), or --input and --output"),
        (("--question", "Who?"), "--context"),
        (("--text", "Ada wrote it."), "--question"),
        (("--input", "x"), "--output"),
        (("--question", "Who?", "--context", "x", "--input", "y"), "--output"),
        (("--question", " ", "--context", "Ada wrote it."), "the question is blank"),
        (("--question", "Who?", "--context", ""), "the context is empty"),
        (("--question", "who " * 400, "--context", "Ada wrote it."), "the question has 400 tokens"),
        (("--question", "Who?", "--text", "\udcff"), "lone surrogate"),
        (("--question", "Who?", "--context", "notes.txt"), "'notes.txt' looks like a file"),
        (("--question", "Who?", "--text", "Ada.", "--schedule", "1,1,1"), "3 entries, the model 2 layers"),
        (("--question", "Who?", "--text", "Ada.", "--device", "abacus"), "abacus"),
    ],
)
def test_answer_says_what_is_wrong_in_one_line(
    run: Run, model_folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = run("answer", "--model", model_folder, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("dtbert: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_texts_name_themselves_in_short(run: Run, model_folder: Path) -> None:
    texts = ("Ada wrote the letter in London. " * 9, "Zoe said it.")
    out = run("answer", "--question", "Who?", "--text", *texts, "--model", model_folder, "--top", 9).out
    names = {line.partition(" of ")[2] for line in out.splitlines() if line.startswith("   score")}
    assert names == {f'"{texts[0][:60].strip()}"', f'"{texts[1]}"'}


def test_scorer_that_was_not_named_is_said(run: Run, model_folder: Path) -> None:
    arguments = ("answer", "--question", "Who?", "--text", CONTEXT, "--model", model_folder, "--schedule", "0.5,0.2")
    own, named = run(*arguments), run(*arguments, "--scorer", "received")
    assert own.out == named.out
    assert (own.err, named.err) == ("dtbert: the schedule names no scorer: the model's own chooses, received\n", "")


@given(st.text(), st.data())
def test_excerpt_is_one_printable_line_with_the_answer(context: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(context)))
    end = data.draw(st.integers(start, len(context)))
    shown = excerpt(context, start, end)
    assert shown.isprintable()
    assert "[" in shown
    assert len(shown) <= len(context[start:end]) + 120


def test_excerpt_cuts_at_words_and_shows_no_control_characters() -> None:
    context = "first words " * 10 + "\x1b[31mthe answer\x07 " + "last words " * 10
    start = context.index("the answer")
    shown = excerpt(context, start, start + len("the answer"))
    assert shown.startswith("... ")
    assert shown.endswith(" ...")
    assert "[the answer]" in shown
    assert "\x1b" not in shown
    assert excerpt("Ada wrote it.", 0, 3) == "[Ada] wrote it."
