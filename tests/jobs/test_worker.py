"""A worker answers with the model that the job was started with, or says why not."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dtbert.jobs.blocks import input_files, plan
from dtbert.jobs.folder import OutputFolder
from dtbert.jobs.lines import model_sha256
from dtbert.jobs.places import Place
from dtbert.jobs.worker import Answering, Worker
from dtbert.qa import QuestionAnswerer
from tests.cli.questions import read, write_questions


def test_a_worker_writes_to_any_file_system_and_stops_at_another_model(model_folder: Path, tmp_path: Path) -> None:
    digest = model_sha256(model_folder, QuestionAnswerer.load(model_folder))
    answering = Answering(str(model_folder), None, digest, "cpu", "float32", 1, {}, {}, 1)
    (block,) = plan(input_files(str(write_questions(tmp_path / "q.jsonl", 9))), 10**6)
    (tmp_path / "local").mkdir()
    worker, local = (
        Worker(answering, OutputFolder(Place.of(name), "jsonl"))
        for name in ("memory://worker/out", str(tmp_path / "local"))
    )
    local.output.place.fs.makedirs(f"{local.output.place.path}/_blocks")
    record = worker.answer(block)
    assert local(asdict(block)) == {"error": None}
    part = worker.output.part(0)
    assert part.fs.cat_file(part.path) == (tmp_path / "local" / "part-000000.jsonl").read_bytes()
    lines = read(tmp_path / "local" / "part-000000.jsonl")
    assert (record.rows, record.failed) == (len(lines), sum("error" in line for line in lines))
    assert worker.output.records([block]) == [record]

    other = Worker(replace(answering, model_sha256="0"), worker.output)
    error = other(asdict(block))["error"]
    assert str(model_folder) in error
    assert "is another model than where the job was started" in error
    with pytest.raises(ValueError, match="another model"):
        other.answer(block)
