"""The threshold beside a model: written, read, refused, and warned of where it is of other weights."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from dtbert.qa import ChosenThreshold, QuestionAnswerer, read_threshold, write_threshold
from dtbert.qa.thresholds import threshold_of
from dtbert.weights import convert, resolve_source, weights_sha256

CHOSEN = ChosenThreshold(-1.25, 71.5, "held-out.json", 1000, "0" * 64)


def test_threshold_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_threshold(tmp_path / "no_answer.json", CHOSEN)
    assert read_threshold(tmp_path / "no_answer.json") == CHOSEN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2, this dtbert reads 1"),
        ({"threshold": None}, "threshold: expected a finite number, found null"),
        ({"more": 1}, r"unknown \['more'\]"),
    ],
)
def test_threshold_file_that_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "no_answer.json"
    write_threshold(file, CHOSEN)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"no_answer\.json: .*{message}.*--choose-threshold"):
        read_threshold(file)


def test_threshold_beside_a_model_is_its_own_and_goes_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_source(None), folder)
    (folder / "no_answer.json").unlink(missing_ok=True)
    assert threshold_of(folder) is None
    write_threshold(folder / "no_answer.json", CHOSEN._replace(model_sha256=weights_sha256(folder)))
    with caplog.at_level(logging.WARNING, "dtbert"):
        assert QuestionAnswerer.load(folder, with_schedules=False).threshold == -1.25
        assert QuestionAnswerer.load(folder, with_schedules=False, threshold=2.0).threshold == 2.0
        assert threshold_of(convert(folder, tmp_path / "converted")) == -1.25
    assert caplog.messages == []
    write_threshold(folder / "no_answer.json", CHOSEN)
    assert threshold_of(folder) == -1.25
    assert "was chosen with other weights" in caplog.text
