"""The small scripts around training: splitting question files, averaging models."""

import gzip
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dtbert import load_model
from dtbert.evaluation import SquadQuestion, read_squad
from dtbert.weights import save_model
from tests.qa.conftest import make_model

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module(name)


def test_split_loses_no_question_and_holds_whole_articles_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_squad = script("split_squad", monkeypatch)

    def paragraph(number: int) -> dict[str, Any]:
        return {"context": f"text {number}", "qas": [{"id": f"{number}-{which}"} for which in range(3)]}

    def ids(articles: list[dict[str, Any]]) -> set[str]:
        return {one["id"] for article in articles for part in article["paragraphs"] for one in part["qas"]}

    articles = [{"title": f"t{number}", "paragraphs": [paragraph(number)]} for number in range(400)]
    articles += [{"title": title, "paragraphs": [paragraph(400)]} for title in split_squad.SQUAD.titles]
    for source in split_squad.SOURCES:
        (tmp_path / f"{source.file}.json.gz").write_bytes(
            gzip.compress(json.dumps({"version": "1", "data": articles}).encode())
        )
    monkeypatch.setattr("sys.argv", ["split_squad.py", str(tmp_path), str(tmp_path / "parts")])
    split_squad.main()
    for source in split_squad.SOURCES:
        train, held = (
            json.loads((tmp_path / "parts" / f"{name}.json").read_text())["data"]
            for name in (source.train, source.held_out)
        )
        assert len(train) + len(held) == len(articles)
        assert ids(train) | ids(held) == ids(articles)
        titles = {article["title"] for article in held}
        if source is split_squad.SQUAD:
            assert titles == source.titles
            assert len(titles) == 10
            continue
        assert abs(len(held) / len(articles) - source.part) < 0.06
        keys = [
            article["paragraphs"][0]["context"] if source.hashed == "context" else article["title"] for article in held
        ]
        assert all(split_squad.is_in_part(key, source.part) for key in keys)
    names = ("choose", "choose-articles", "choose-new-wiki")
    both, *held_out = (json.loads((tmp_path / "parts" / f"{name}.json").read_text())["data"] for name in names)
    assert both == [*held_out[0], *held_out[1]]


def test_split_reads_files_under_the_names_that_they_come_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split_squad = script("split_squad", monkeypatch)
    titles = (*split_squad.SQUAD.titles, "t")

    def run() -> Path:
        monkeypatch.setattr("sys.argv", ["split_squad.py", str(tmp_path), str(tmp_path / "parts"), "--no-answer", "1"])
        split_squad.main()
        return tmp_path / "parts"

    def document(kind: str) -> str:
        asked = {"id": kind, "question": "Who wrote it?", "answers": [{"text": "Ada", "answer_start": 0}]}
        paragraphs = [{"context": "Ada wrote it.", "qas": [asked]}, {"context": "Grace wrote it.", "qas": []}]
        paragraphs.append({"context": "Fine weather.", "qas": []})
        return json.dumps({"version": "1", "data": [{"title": title, "paragraphs": paragraphs} for title in titles]})

    for source in split_squad.SOURCES:
        with pytest.raises(SystemExit):
            run()
        assert f"{source.official}.json, {source.official}.json.gz" in capsys.readouterr().err
        assert not (tmp_path / "parts").exists()
        (tmp_path / f"{source.official}.json").write_text(document(source.official))
    assert not (run() / "half-no-answer-dev.json").exists()
    assert "no half-no-answer-dev.json: " in capsys.readouterr().out
    (tmp_path / "squad-dev-v1.1.json.gz").write_bytes(gzip.compress(document("dev").encode()))
    half = read_squad_of(run() / "half-no-answer-dev.json", titles[0])
    assert [(one.id, one.context, one.is_impossible) for one in half] == [
        ("dev", "Ada wrote it.", False),
        ("dev-elsewhere", "Grace wrote it.", True),
    ]


def read_squad_of(path: Path, title: str) -> list[SquadQuestion]:
    """The questions of one article, whose ids others repeat."""
    document = json.loads(path.read_text())
    path.write_text(json.dumps({"data": [one for one in document["data"] if one["title"] == title]}))
    return list(read_squad(path))


def test_paragraphs_of_one_article_may_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    split_squad = script("split_squad", monkeypatch)
    paragraphs = [{"context": f"text {number}", "qas": []} for number in range(200)]
    source = split_squad.Source("file", "train", "held", hashed="context", part=0.5)
    train, held = split_squad.split([{"title": "all", "paragraphs": paragraphs}], source)
    assert len(train) + len(held) == 200
    assert 60 < len(held) < 140


def test_question_without_an_answer_stands_beside_the_likest_paragraph_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_squad = script("split_squad", monkeypatch)

    def article(*paragraphs: tuple[str, list[tuple[str, str]]]) -> dict[str, Any]:
        return {
            "title": "t",
            "paragraphs": [
                {
                    "context": context,
                    "qas": [
                        {"id": f"{number}{place}", "question": asked, "answers": [{"text": text, "answer_start": 0}]}
                        for place, (asked, text) in enumerate(qas)
                    ],
                }
                for number, (context, qas) in enumerate(paragraphs)
            ],
        }

    made = split_squad.without_answers(
        [
            article(
                ("Ada wrote the first program.", [("Who wrote the program?", "Ada"), ("Whence?", "the")]),
                ("The program was first run by Ada.", []),
                ("Grace wrote the compiler.", []),
                ("The weather was fine.", []),
            ),
            article(("A text alone.", [("Which text?", "A text")])),
        ],
        1.0,
    )
    # The likest holds the answer; the second question shares no word with any other paragraph.
    (paragraph,) = made[0]["paragraphs"]
    assert paragraph["context"] == "Grace wrote the compiler."
    assert [one["id"] for one in paragraph["qas"]] == ["00-elsewhere"]
    (tmp_path / "made.json").write_text(json.dumps({"data": made}))
    assert [one.is_impossible for one in read_squad(tmp_path / "made.json")] == [True]
    assert len(made) == 1


def test_average_is_the_mean_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average = script("average_models", monkeypatch)
    models = [make_model(initializer_range=spread) for spread in (0.5, 0.1, 0.9)]
    folders = [str(save_model(model, tmp_path / str(number))) for number, model in enumerate(models)]
    (Path(folders[0]) / "vocab.txt").write_text("[PAD]\n")
    monkeypatch.setattr("sys.argv", ["average_models.py", str(tmp_path / "mean"), *folders])
    average.main()
    mean = load_model(tmp_path / "mean")
    for got, *parts in zip(mean.parameters(), *(load_model(folder).parameters() for folder in folders), strict=True):
        assert torch.allclose(got.to_dense(), torch.stack([part.to_dense() for part in parts]).mean(0))
    assert (tmp_path / "mean" / "vocab.txt").read_text() == "[PAD]\n"
    with pytest.raises(SystemExit, match="mean is there already"):
        average.main()
    files = [f"{folder}/model.safetensors" for folder in folders]
    monkeypatch.setattr("sys.argv", ["average_models.py", str(tmp_path / "of_files"), *files])
    average.main()
    assert (tmp_path / "of_files" / "vocab.txt").read_text() == "[PAD]\n"
    other = save_model(make_model(intermediate_size=64), tmp_path / "other")
    monkeypatch.setattr("sys.argv", ["average_models.py", str(tmp_path / "no"), folders[0], str(other)])
    with pytest.raises(SystemExit, match="models of one shape"):
        average.main()
