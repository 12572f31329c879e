"""Writing: round trips, conversion, int8, and folders that appear whole or not at all."""

import copy
import errno
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from dtbert.model import BertConfig, BertEncoder, BertForQuestionAnswering
from dtbert.weights import (
    CheckpointError,
    convert,
    load_encoder,
    load_model,
    resolve_source,
    save_model,
    to_hub_tensors,
    weights_sha256,
)
from dtbert.weights.quantize import dequantize_rows, quantize_rows
from tests.full_disk import largest_file
from tests.tolerances import assert_as_right_as_peer
from tests.weights.checkpoints import CONFIG, assert_same, make_tensors, write

IDS = torch.tensor([[1, 5, 9, 3], [7, 2, 39, 0]])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_saved_model_loads_bit_for_bit(tmp_path: Path, backend: str) -> None:
    tensors = make_tensors()
    model = load_model(write(tmp_path / "first", tensors), backend=backend)  # type: ignore[arg-type]
    folder = save_model(model, tmp_path / "second")
    assert folder == tmp_path / "second"
    assert_same(to_hub_tensors(load_model(folder)), tensors)
    assert load_model(folder).config == model.config


def test_saved_encoder_loads_bit_for_bit(tmp_path: Path) -> None:
    tensors = make_tensors(pooler=True, span_head=False)
    encoder = load_encoder(write(tmp_path / "first", tensors))
    stored = load_file(save_model(encoder, tmp_path / "second") / "model.safetensors")
    assert_same({f"bert.{name}": tensor for name, tensor in stored.items()}, tensors)
    assert_same(to_hub_tensors(load_encoder(tmp_path / "second")), stored)


def test_untrained_model_is_saved_with_its_gradients_switched_on(tmp_path: Path) -> None:
    model = BertForQuestionAnswering(BertConfig.from_dict(CONFIG))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    assert_same(load_file(save_model(model, tmp_path / "new") / "model.safetensors"), to_hub_tensors(model))


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "first", make_tensors()))
    theirs, report = transformers.BertForQuestionAnswering.from_pretrained(
        save_model(model, tmp_path / "second"), output_loading_info=True
    )
    assert not any(report.values())
    logits = [one(IDS).start_logits.detach() for one in (model, theirs, copy.deepcopy(theirs).double())]
    assert_as_right_as_peer(*([one] for one in logits))
    encoder = load_encoder(write(tmp_path / "third", make_tensors(pooler=True, span_head=False)))
    theirs, report = transformers.BertModel.from_pretrained(
        save_model(encoder, tmp_path / "fourth"), output_loading_info=True
    )
    assert not any(report.values())
    pooled = [one(IDS).pooler_output.detach() for one in (encoder, theirs, copy.deepcopy(theirs).double())]
    assert_as_right_as_peer(*([one] for one in pooled))


def test_convert_turns_a_pickle_into_safetensors_with_its_companions(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in make_tensors(pooler=True).items()}
    extras = {"fit_dense.weight": torch.randn(3, 3), "bert.embeddings.position_ids": torch.arange(20)[None]}
    source = write(tmp_path / "source", tensors | extras, "pytorch_model.bin")
    companions = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md", "schedules.json", "LICENSE")
    for name in (*companions, "training_args.bin", "notes.txt"):
        (source / name).write_text(f"this is {name}")
    dest = convert(source, tmp_path / "dest")
    assert dest == tmp_path / "dest"
    assert sorted(path.name for path in dest.iterdir()) == sorted((*companions, "config.json", "model.safetensors"))
    for name in (*companions, "config.json"):
        assert (dest / name).read_bytes() == (source / name).read_bytes()
    assert_same(load_file(dest / "model.safetensors"), tensors)


def test_convert_writes_old_names_anew_and_an_encoder_without_prefix(tmp_path: Path) -> None:
    tensors = make_tensors(span_head=False)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    stored = load_file(convert(write(tmp_path / "old", old), tmp_path / "new") / "model.safetensors")
    assert_same(stored, {name.removeprefix("bert."): tensor for name, tensor in tensors.items()})


def test_convert_to_int8_keeps_every_weight_within_half_a_step(tmp_path: Path) -> None:
    tensors = make_tensors(pooler=True)
    dest = convert(write(tmp_path / "plain", tensors), tmp_path / "int8", int8=True)
    assert sorted(path.name for path in dest.iterdir()) == ["config.json", "model.int8.safetensors"]
    stored = load_file(dest / "model.int8.safetensors")
    small = {"bert.embeddings.token_type_embeddings.weight", "qa_outputs.weight"}
    matrices = {name for name, tensor in tensors.items() if tensor.ndim == 2} - small
    assert stored.keys() == tensors.keys() | {f"{name}.scale" for name in matrices}
    loaded = to_hub_tensors(load_model(dest))
    for name, tensor in loaded.items():
        if name in matrices:
            scale = stored[f"{name}.scale"]
            assert (stored[name].dtype, scale.dtype, scale.shape) == (torch.int8, torch.float16, tensor.shape[:1])
            assert ((tensor - tensors[name]).abs() <= scale.float()[:, None] * 0.5001).all(), name
        else:
            assert torch.equal(tensor, tensors[name].half().float()), name
    assert "pooler.dense.weight" in to_hub_tensors(load_encoder(dest))


def test_shipped_model_survives_expansion_and_conversion_bit_for_bit(tmp_path: Path) -> None:
    convert(None, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "int8", int8=True)
    shipped = resolve_source(None)
    assert_same(load_file(tmp_path / "int8" / "model.int8.safetensors"), load_file(shipped / "model.int8.safetensors"))
    for name in ("config.json", "tokenizer.json", "README.md"):
        assert (tmp_path / "int8" / name).read_bytes() == (shipped / name).read_bytes()
    assert_same(to_hub_tensors(load_model(tmp_path / "plain")), to_hub_tensors(load_model()))


def test_schedules_name_the_converted_weights_where_these_hold_the_same_values(tmp_path: Path) -> None:
    source = write(tmp_path / "source", make_tensors(), "pytorch_model.bin")
    digest, other = weights_sha256(source), 64 * "a"
    (source / "schedules.json").write_text(f"measured with {digest}, then with {other}")
    for path in (source, source / "pytorch_model.bin"):
        dest = convert(path, tmp_path / "of" / path.name)
        assert (dest / "schedules.json").read_text() == f"measured with {weights_sha256(dest)}, then with {other}"
    small = convert(source, tmp_path / "int8", int8=True)
    assert (small / "schedules.json").read_text() == (source / "schedules.json").read_text()


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(-8e6, 8e6, width=32),
    )
)
def test_quantized_row_is_within_half_a_step(values: np.ndarray) -> None:
    weight = torch.from_numpy(values)
    quantized, scale = quantize_rows(weight)
    assert scale.isfinite().all()
    assert quantized.min() >= -127
    error = (dequantize_rows(quantized, scale) - weight).abs()
    assert (error <= scale.float()[:, None] * 0.5001).all()
    assert (quantized[(weight == 0).all(1)] == 0).all()


@pytest.mark.parametrize("int8", [False, True])
def test_convert_of_broken_weights_leaves_nothing(tmp_path: Path, int8: bool) -> None:
    tensors = make_tensors()
    tensors["qa_outputs.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"qa_outputs\.bias"):
        convert(write(tmp_path / "source", tensors), tmp_path / "a" / "b", int8=int8)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["qa_outputs.bias", "bert.embeddings.word_embeddings.weight"])
def test_convert_to_int8_refuses_what_float16_cannot_hold(tmp_path: Path, name: str) -> None:
    tensors = make_tensors()
    tensors[name].view(-1)[3 % tensors[name].numel()] = 1e9
    write(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=name):
        convert(tmp_path / "source", tmp_path / "dest", int8=True)
    assert not (tmp_path / "dest").exists()
    convert(tmp_path / "source", tmp_path / "dest")


def test_convert_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none", tmp_path / "dest")
    assert list(tmp_path.iterdir()) == []


def test_destination_that_holds_something_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "mine.txt").write_text("mine")
    model = load_model()
    for write_to in (lambda path: convert(None, path), lambda path: save_model(model, path)):
        for dest in (tmp_path / "dest", tmp_path / "dest" / "mine.txt"):
            with pytest.raises(FileExistsError, match=r"dest.* is there already"):
                write_to(dest)
    assert [path.read_text() for path in (tmp_path / "dest").iterdir()] == ["mine"]


def test_empty_destination_and_missing_parents_are_fine(tmp_path: Path) -> None:
    source = write(tmp_path / "source", make_tensors())
    (tmp_path / "empty").mkdir()
    for dest in (tmp_path / "empty", tmp_path / "deep" / "er"):
        load_model(convert(str(source), str(dest)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "source"]


def test_written_files_are_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    dest = convert(write(tmp_path / "source", make_tensors()), tmp_path / "dest", int8=True)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in dest.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


@pytest.mark.parametrize("size", [0, 100, 5000])
@pytest.mark.parametrize("int8", [False, True])
def test_write_that_fails_leaves_nothing(tmp_path: Path, size: int, int8: bool) -> None:
    source = write(tmp_path / "source", make_tensors())
    with largest_file(size), pytest.raises(OSError, match=r"cannot write .*dest: .*too large"):
        convert(source, tmp_path / "new" / "dest", int8=int8)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    model = load_model(source)
    with largest_file(size), pytest.raises(OSError, match=r"cannot write .*dest: .*too large"):
        save_model(model, tmp_path / "new" / "dest")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_disk_that_fills_up_after_the_weights_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, dest: Path) -> None:
        dest.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = write(tmp_path / "source", make_tensors())
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"cannot write .*dest: .*No space left"):
        convert(source, tmp_path / "dest")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = BertEncoder(BertConfig.from_dict(CONFIG))
    # The files are written, the folder has not yet its name.
    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "dest")
    assert list(tmp_path.iterdir()) == []
