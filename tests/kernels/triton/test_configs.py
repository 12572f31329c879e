"""Configurations of kernels: measured, default and forced, and the tables that hold them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtbert.kernels.triton import MAX_HEAD_SIZE, configs
from dtbert.kernels.triton.configs import (
    AttentionConfig,
    Table,
    Tuned,
    candidates,
    config_for,
    forcing,
    padded_size,
    read_table,
    tunable_kernels,
    variants,
    write_table,
)
from dtbert.kernels.triton.launch import ARCHITECTURES, FLOAT_DTYPES
from tests.kernels.triton.cases import TRITON
from tests.kernels.triton.packing import pack

CONFIG = AttentionConfig(64, 32, 16, 4, 3)
ROW = Tuned("attention", "bfloat16", 64, "received", CONFIG, 12.5, (12.0, 13.25))
TABLE = Table("sm_90", "NVIDIA H100", {"torch": "2.11.0"}, "abc", (ROW, ROW._replace(variant="context")))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    for cached in (configs._chosen, configs._measured):
        # The caches' own functions: what is read here is nobody else's.
        monkeypatch.setattr(configs, cached.__name__, cached.__wrapped__)
    return tmp_path


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write_table(TABLE, tmp_path)
    assert path == tmp_path / "sm_90.json"
    assert read_table(path) == TABLE
    assert sum("median_us" in line for line in path.read_text().splitlines()) == 2
    empty = TABLE._replace(rows=())
    assert read_table(write_table(empty, tmp_path)) == empty


def test_what_was_measured_is_taken_and_else_the_default(tables: Path) -> None:
    default = config_for("sm_90", "attention", torch.bfloat16, 64, "received")
    write_table(TABLE, tables)
    assert default != CONFIG
    for dtype in (torch.bfloat16, torch.float16):
        assert config_for("sm_90", "attention", dtype, 64, "received") == CONFIG
        assert config_for("sm_90", "attention", dtype, 60, "received") == CONFIG  # of a tile of 64 too
    for other in (("sm_80", torch.bfloat16, 64, "received"), ("sm_90", torch.float32, 64, "received")):
        arch, dtype, size, variant = other
        assert config_for(arch, "attention", dtype, size, variant) != CONFIG
    assert config_for("sm_90", "attention", torch.bfloat16, 32, "received") != CONFIG
    assert config_for("sm_90", "attention", torch.bfloat16, 64, "alone") == default


def test_a_forced_configuration_is_launched_and_forgotten() -> None:
    packed = pack([70], 2, 16)
    default = TRITON.scored_attention(*packed, "received")
    with forcing("attention", CONFIG):
        assert config_for("sm_90", "attention", torch.float32, 16) == CONFIG
        forced = TRITON.scored_attention(*packed, "received")
        with pytest.raises(RuntimeError), forcing("attention", CONFIG._replace(block_m=16)):
            raise RuntimeError
        assert config_for("sm_90", "attention", torch.float32, 16) == CONFIG
    assert config_for("sm_90", "attention", torch.float32, 16, "context") != CONFIG
    for got, want in zip(forced, default, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # Other blocks, other sums.
    assert not torch.equal(forced[0], default[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.pop("rows"), r"expected the fields .* missing \['rows'\]"),
        (lambda table: table.update(arch="sm_80"), "arch: expected 'sm_90', found 'sm_80'"),
        (lambda table: table["rows"][0].update(kernel="attend"), r"rows\[0\]\.kernel: .*, found 'attend'"),
        (lambda table: table["rows"][1].update(variant="all"), r"rows\[1\]\.variant: .*, found 'all'"),
        (lambda table: table["rows"][0].update(dtype="int8"), r"rows\[0\]\.dtype: .*, found 'int8'"),
        (lambda table: table["rows"][0]["config"].update(block_n=48), "expected block_n of 16 or more, a power of two"),
        (lambda table: table["rows"][0]["config"].update(num_stages=0), "expected num_stages of 1 or more"),
        (lambda table: table["rows"][0]["config"].pop("second_n"), r"missing \['second_n'\]"),
        (lambda table: table["rows"][0].update(median_us="fast"), r"rows\[0\]\.median_us: expected a finite number"),
        (lambda table: table["rows"][0].update(quartiles_us=[1.0]), "expected two numbers, found 1"),
        (lambda table: table["rows"].append(table["rows"][0]), r"rows: expected each configuration once"),
    ],
)
def test_a_damaged_table_is_one_clear_error(
    tables: Path, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = write_table(TABLE, tables)
    table = json.loads(path.read_text())
    damage(table)
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"^damaged table of configurations {path}: .*{message}.*; delete it"):
        config_for("sm_90", "attention", torch.bfloat16, 64, "received")
    path.write_text("{")
    with pytest.raises(ValueError, match=rf"^damaged table of configurations {path}: not JSON"):
        config_for("sm_90", "attention", torch.bfloat16, 64, "received")


def test_tables_of_the_package_are_whole() -> None:
    for path in configs.TABLES.glob("*.json"):
        assert read_table(path).rows


def test_every_configuration_fits_the_sizes_of_a_product() -> None:
    keys = itertools.product(tunable_kernels(), FLOAT_DTYPES, range(1, MAX_HEAD_SIZE + 1))
    for kernel, dtype, size in keys:
        for variant in variants(kernel):
            chosen = [config_for(arch, kernel, dtype, size, variant) for arch in (*ARCHITECTURES, "sm_75")]
            for config in (*chosen, *candidates(kernel, dtype, size, variant)):
                blocks = [number for name, number in config._asdict().items() if "num" not in name]
                assert min(*blocks, padded_size(size)) >= 16
                assert size <= padded_size(size) < max(17, 2 * size)
                assert all(number & (number - 1) == 0 for number in (*blocks, config.num_warps))


def test_a_candidate_is_tried_once() -> None:
    for kernel, dtype, size in itertools.product(tunable_kernels(), FLOAT_DTYPES, (32, 64, 128)):
        for variant in variants(kernel):
            tried = candidates(kernel, dtype, size, variant)
            assert len(set(tried)) == len(tried) > 2
