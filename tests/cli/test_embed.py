"""`dtbert embed`: vectors of a few texts, arrays and lines of a file's, and what it refuses."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dtbert import LengthSchedule, SentenceEncoder
from tests.cli.conftest import Run
from tests.cli.questions import read
from tests.text.conftest import write_classifier

TEXTS = ["bo ba di do", "fe fi bo", "di"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("embed") / "model")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": number, "text": text} for number, text in enumerate(["", *TEXTS[:2], " ", TEXTS[2]])]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_a_few_texts_are_shown_with_their_cosines(run: Run, model: Path) -> None:
    status, out, err = run("embed", "--model", model, "--text", *TEXTS)
    found = SentenceEncoder.load(model).encode(TEXTS)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        [f"{place}.", f"{value:.4f}"] for place, value in enumerate(found[:, 0].tolist(), start=1)
    ]
    assert all(line.endswith(f"32 values, length {one.norm():.4g}") for line, one in zip(lines, found, strict=False))
    cosines = torch.cosine_similarity(found[:1], found[1:]).tolist()
    assert lines[3:] == [f"cosine of 1 and {place}: {one:.4f}" for place, one in enumerate(cosines, start=2)]


@pytest.mark.parametrize(
    "options", [(), ("--normalize",), ("--pooling", "cls", "--schedule", "0.6,0.4", "--scorer", "cls")]
)
def test_json_holds_each_float32_as_it_is(run: Run, model: Path, options: tuple[str, ...]) -> None:
    out = run("embed", "--model", model, "--text", *TEXTS, "--json", *options).out
    schedule = LengthSchedule.ratios([0.6, 0.4], scorer="cls") if "--schedule" in options else None
    encoder = SentenceEncoder.load(model, pooling="cls" if "cls" in options else None)
    want = encoder.encode(TEXTS, normalize="--normalize" in options, schedule=schedule)
    assert torch.equal(torch.tensor(json.loads(out)["embeddings"]), want)


def test_an_array_has_a_row_for_each_line_and_the_lines_the_same_numbers(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("embed", "--model", model, "--normalize", "--input")
    status, out, err = run(*command, "texts.jsonl", "--output", "vectors.npy")
    assert (status, out) == (1, "")
    assert [line.partition(": ")[2].partition(":")[0] for line in err.splitlines()[:2]] == [
        "texts.jsonl, line 1",
        "texts.jsonl, line 4",
    ]
    assert err.splitlines()[2] == "dtbert: 2 of 5 lines failed"
    found = np.load("vectors.npy")
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((5, 32), np.float32, True)
    assert np.isnan(found[[0, 3]]).all()
    want = SentenceEncoder.load(model).encode(TEXTS, normalize=True).numpy()
    np.testing.assert_allclose(found[[1, 2, 4]], want, atol=1e-6)
    assert sorted(path.name for path in Path().iterdir()) == ["texts.jsonl", "vectors.npy"]

    assert run(*command, "texts.jsonl", "--output", "vectors.jsonl").status == 1
    lines = read(Path("vectors.jsonl"))
    assert [(line["id"], "error" in line) for line in lines] == [
        (0, True),
        (1, False),
        (2, False),
        (3, True),
        (4, False),
    ]
    by_lines = np.array([line["embedding"] for line in lines if "embedding" in line], np.float32)
    assert np.array_equal(by_lines, found[[1, 2, 4]])
    assert (
        "other settings (normalize)" in run(*command, "texts.jsonl", "--output", "vectors.jsonl", "--no-normalize").err
    )

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("texts.jsonl").read_bytes())))
    assert run(*command, "-", "--output", "piped.npy").status == 1
    assert np.array_equal(np.load("piped.npy"), found, equal_nan=True)


def test_what_an_interruption_leaves_is_no_array(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SentenceEncoder, "encode_many", interrupt)
    assert run("embed", "--model", model, "--input", "texts.jsonl", "--output", "vectors.npy").status == 130
    assert [path.name for path in Path().iterdir()] == ["texts.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --text, or --input and --output"),
        (("--text", "bo", "--output", "vectors.npy"), "give either --text"),
        (("--text", "bo", ""), "text 1: the text is empty"),
        (("--text", "bo", "--schedule", "1,1,1"), "3 entries, the model 2 layers"),
        (("--input", "texts.jsonl", "--output", "there.npy"), "there.npy is there already"),
        (("--input", "texts.jsonl", "--output", "nowhere/vectors.npy"), "there is no folder nowhere"),
        (("--input", "none.jsonl", "--output", "vectors.npy"), "none.jsonl: No such file"),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Run, model: Path, arguments: tuple[str, ...], message: str) -> None:
    Path("there.npy").write_text("mine")
    status, out, err = run("embed", "--model", model, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert Path("there.npy").read_text() == "mine"


def test_the_model_that_ships_is_none_for_texts(run: Run) -> None:
    assert "name a sentence encoder, such as sentence-transformers/all-MiniLM-L6-v2" in run("embed", "--text", "a").err
