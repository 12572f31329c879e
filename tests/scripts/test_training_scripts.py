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
    for name, *_ in split_squad.SOURCES:
        (tmp_path / f"{name}.json.gz").write_bytes(
            gzip.compress(json.dumps({"version": "1", "data": articles}).encode())
        )
    monkeypatch.setattr("sys.argv", ["split_squad.py", str(tmp_path), str(tmp_path / "parts")])
    split_squad.main()
    for name, hashed, part, held_out in split_squad.SOURCES:
        train = json.loads((tmp_path / "parts" / f"train-{name}.json").read_text())["data"]
        if not part:
            assert ids(train) == ids(articles)
            continue
        held = json.loads((tmp_path / "parts" / f"{held_out}.json").read_text())["data"]
        assert ids(train) | ids(held) == ids(articles)
        assert not ids(train) & ids(held)
        assert abs(len(held) / len(articles) - part) < 0.06
        keys = [article["title"] if hashed == "title" else article["paragraphs"][0]["context"] for article in held]
        assert all(split_squad.is_held_out(key, part) for key in keys)


def test_paragraphs_of_one_article_may_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    split_squad = script("split_squad", monkeypatch)
    paragraphs = [{"context": f"text {number}", "qas": []} for number in range(200)]
    train, held = split_squad.split([{"title": "all", "paragraphs": paragraphs}], "context", 0.5)
    assert len(train) + len(held) == 200
    assert 60 < len(held) < 140


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
