"""The output folder knows what is done, and which job it belongs to; on a local disk and elsewhere."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dtbert.jobs.blocks import Block, InputFile
from dtbert.jobs.folder import Manifest, OutputFolder, Record
from dtbert.jobs.places import Place

BLOCKS = [Block(number, "a", "lines", 1 + number, 1, number, 1, "00") for number in range(3)]
MANIFEST = Manifest({"top": 1, "schedule": None}, [InputFile("a", 3)], BLOCKS)
RECORD = Record(1, 10, 2, 99, 100, 101, 0.5, 1.0, 2.0, "host:1")


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OutputFolder]:
    place = Place.of(str(tmp_path / "out") if request.param == "local" else "memory://jobs/out")
    yield OutputFolder(place, "jsonl")
    if place.fs.exists(place.path):
        place.fs.rm(place.path, recursive=True)


def test_a_block_is_done_with_its_part_and_its_record(folder: OutputFolder) -> None:
    folder.write_manifest(MANIFEST)
    assert folder.left(BLOCKS) == BLOCKS
    folder.part(1).write(b"{}\n")
    assert folder.left(BLOCKS) == BLOCKS
    folder.write_record(RECORD)
    assert folder.left(BLOCKS) == [BLOCKS[0], BLOCKS[2]]
    assert folder.records(BLOCKS[1:2]) == [RECORD]
    assert folder.records([]) == []
    folder.part(1).fs.rm(folder.part(1).path)
    assert folder.left(BLOCKS) == BLOCKS


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = OutputFolder(Place.of(str(tmp_path / "a[1] * ?")), "jsonl")
    folder.write_manifest(MANIFEST)
    folder.write_record(RECORD)
    assert folder.records(BLOCKS[1:2]) == [RECORD]


def test_the_same_job_goes_on_and_another_is_refused(folder: OutputFolder) -> None:
    assert folder.manifest(MANIFEST.settings, MANIFEST.files) is None
    folder.write_manifest(MANIFEST)
    assert folder.manifest(MANIFEST.settings, MANIFEST.files) == MANIFEST
    advice = ": name another --output, or delete .*out to start afresh$"
    with pytest.raises(ValueError, match=r"made from other settings \(schedule, top\)" + advice):
        folder.manifest({"top": 2, "schedule": [1]}, MANIFEST.files)
    for files in ([InputFile("a", 4)], [InputFile("b", 3)], [], [*MANIFEST.files, InputFile("b", 1)]):
        with pytest.raises(ValueError, match=r"\(input files\)" + advice):
            folder.manifest(MANIFEST.settings, files)
    (folder.place / "_manifest.json").write(MANIFEST.to_json()[:-5].encode())
    with pytest.raises(ValueError, match=r"_manifest.json is damaged: not JSON.*" + advice):
        folder.manifest(MANIFEST.settings, MANIFEST.files)


def test_what_is_no_jobs_folder_is_refused(folder: OutputFolder) -> None:
    folder.place.fs.makedirs(folder.place.path)
    (folder.place / "letter.txt").write(b"Dear Ada,")
    with pytest.raises(FileExistsError, match="is no job's folder"):
        folder.manifest(MANIFEST.settings, MANIFEST.files)
    with pytest.raises(FileExistsError, match="is no job's folder"):
        replace(folder, place=folder.place / "letter.txt").manifest(MANIFEST.settings, MANIFEST.files)


def test_what_killed_workers_left_is_removed_at_the_end(folder: OutputFolder) -> None:
    folder.write_manifest(MANIFEST)
    (folder.place / ".part-000001.jsonl.0a0b0c0d.partial").write(b"{")
    folder.finish({"blocks": []})
    found = folder.place.fs.find(folder.place.path)
    assert sorted(path.rpartition("/")[2] for path in found) == ["_manifest.json", "_times.json"]


def test_a_local_folder_has_one_job_at_a_time(tmp_path: Path) -> None:
    folder = OutputFolder(Place.of(str(tmp_path / "new" / "out")), "jsonl")
    with folder.locked(), pytest.raises(ValueError, match="another process is writing"), folder.locked():
        pass
    with folder.locked():
        pass
