"""scripts/bench_onnx.py on a window: its rows and its record."""

import json
from pathlib import Path

import pytest
from bench_onnx import main

from dtbert.qa import QuestionAnswerer, load_tokenizer
from dtbert.weights import resolve_source
from tests.export.test_onnx import make_model


def test_a_row_a_provider_and_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = {"id": "1", "question": "Who wrote it?", "answers": [{"text": "Ada", "answer_start": 0}]}
    squad = {"data": [{"paragraphs": [{"context": "Ada wrote it.", "qas": [question]}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(squad), "utf-8")
    answerer, output = (
        QuestionAnswerer(make_model(vocab_size=30522), load_tokenizer(resolve_source(None)), window=50, stride=9),
        tmp_path / "x.json",
    )
    monkeypatch.setattr(QuestionAnswerer, "load", lambda: answerer)
    main([str(tmp_path / "dev.json"), "--windows", "1", "--rounds", "2", "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["dtbert", "ONNX Runtime", "ONNX Runtime"]
    record = json.loads(output.read_text("utf-8"))
    assert (record["windows"], record["threads"]) == (1, 1)
    assert [len(rounds) for rounds in record["ms_a_window"].values()] == [2, 2, 2]
    assert len(record["bytes"]) == 2
