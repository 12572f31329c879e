"""Loading: every kind of source, every known oddity of published checkpoints, and what is refused."""

import logging
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dtbert.weights.load
from dtbert.weights import CheckpointError, load_encoder, load_model, resolve_source
from dtbert.weights.checkpoint import open_checkpoint
from tests.weights.checkpoints import CONFIG, assert_same, hub_tensors, make_tensors, write

IDS = torch.tensor([[1, 5, 9, 3], [7, 2, 39, 0]])


def test_load_model_gives_every_parameter_the_stored_tensor_bit_for_bit(tmp_path: Path) -> None:
    tensors = make_tensors()
    model = load_model(write(tmp_path, tensors))
    assert_same(hub_tensors(model), tensors)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_load_model_without_source_loads_the_shipped_model() -> None:
    model = load_model()
    stored = load_file(resolve_source(None) / "model.int8.safetensors")
    expanded = {
        name: value.float() * (stored[f"{name}.scale"].float()[:, None] if f"{name}.scale" in stored else 1)
        for name, value in stored.items()
        if not name.endswith(".scale")
    }
    assert_same(hub_tensors(model), expanded)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)


@pytest.mark.parametrize("form", ["model.safetensors", "other.safetensors", "pytorch_model.bin", "other.bin"])
def test_load_model_reads_a_single_file_with_its_config_beside_it(tmp_path: Path, form: str) -> None:
    tensors = make_tensors()
    write(tmp_path, tensors, form)
    assert_same(hub_tensors(load_model(tmp_path / form)), tensors)
    assert_same(hub_tensors(load_model(str(tmp_path / form))), tensors)


def test_load_model_prefers_safetensors_over_the_pickle(tmp_path: Path) -> None:
    tensors = make_tensors()
    write(tmp_path, make_tensors(), "pytorch_model.bin")
    write(tmp_path, tensors)
    assert_same(hub_tensors(load_model(tmp_path)), tensors)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_load_model_reads_a_pickle_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, archive: bool) -> None:
    tensors = make_tensors()
    write(tmp_path, {}, "pytorch_model.bin")
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with caplog.at_level(logging.WARNING, "dtbert"):
        model = load_model(tmp_path)
    assert_same(hub_tensors(model), tensors)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"{tmp_path / 'pytorch_model.bin'}: ")
    assert "`dtbert convert`" in said


def test_load_model_never_opens_training_args(tmp_path: Path) -> None:
    write(tmp_path, make_tensors())
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(_Attack(tmp_path / "ran")))
    load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path: Path, archive: bool) -> None:
    write(tmp_path, {}, "pytorch_model.bin")
    content = {**make_tensors(), "evil": _Attack(tmp_path / "ran")}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a whole pickle of tensors"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists(), "the attack works where it is not refused"


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}])
def test_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    write(tmp_path, {}, "pytorch_model.bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* dictionary"):
        load_model(tmp_path)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_known_extras_are_ignored(tmp_path: Path, form: str) -> None:
    tensors = make_tensors()
    extras = {
        "fit_dense.weight": torch.randn(32, 16),
        "fit_denses.6.weight": torch.randn(32, 16),
        "fit_dense.bias": torch.full((32,), torch.nan),
        "bert.embeddings.position_ids": torch.arange(20)[None],
        "bert.pooler.dense.weight": torch.randn(16, 16),
        "bert.pooler.dense.bias": torch.randn(16),
    }
    assert_same(hub_tensors(load_model(write(tmp_path, tensors | extras, form))), tensors)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_encoder_loads_with_and_without_prefix_and_leaves_heads_out(tmp_path: Path, prefix: str) -> None:
    tensors = make_tensors(pooler=True, span_head=False)
    stored = {prefix + name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    stored |= {
        f"{prefix}embeddings.position_ids": torch.arange(20)[None],
        "cls.predictions.bias": torch.randn(40),
        "cls.seq_relationship.weight": torch.randn(2, 16),
        "qa_outputs.weight": torch.randn(2, 16),
        "qa_outputs.bias": torch.randn(2),
    }
    encoder = load_encoder(write(tmp_path, stored))
    assert_same(hub_tensors(encoder), tensors)
    assert encoder(IDS).pooler_output is not None


def test_encoder_has_no_pooler_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    encoder = load_encoder(write(tmp_path, make_tensors()))
    assert encoder.pooler is None
    assert encoder(IDS).pooler_output is None


def test_old_names_gamma_and_beta_are_read(tmp_path: Path) -> None:
    tensors = make_tensors()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    assert_same(hub_tensors(load_model(write(tmp_path, old))), tensors)


def test_misfits_are_one_error_that_lists_every_key_sorted_with_shapes(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    del tensors["bert.embeddings.LayerNorm.weight"]
    tensors["bert.encoder.layer.0.intermediate.dense.weight"] = torch.randn(24, 15)
    tensors["bert.encoder.layer.0.attention.self.key.bias"] = torch.ones(16, dtype=torch.int64)
    tensors["bert.encoder.layer.2.output.dense.bias"] = torch.randn(3)
    tensors["a.stranger"] = torch.randn(2, 1)
    tensors["bert.encoder.layer.0.output.dense.weight"] = torch.ones(16, 24, dtype=torch.int8)
    tensors["bert.encoder.layer.1.intermediate.dense.weight"] = torch.ones(24, 16, dtype=torch.int8)
    tensors["bert.encoder.layer.1.intermediate.dense.weight.scale"] = torch.randn(7)
    with pytest.raises(CheckpointError) as caught:
        load_model(write(tmp_path, tensors))
    first, *rest = str(caught.value).split("\n")
    assert first.startswith(f"{tmp_path / 'model.safetensors'} ")
    assert rest == [
        "  a.stranger: unexpected, [2, 1]",
        "  bert.embeddings.LayerNorm.weight: missing, expected [16]",
        "  bert.encoder.layer.0.attention.self.key.bias: [16] of I64, expected floats",
        "  bert.encoder.layer.0.intermediate.dense.weight: [24, 15], expected [24, 16]",
        "  bert.encoder.layer.0.output.dense.weight: [16, 24] of int8, expected floats or a "
        "bert.encoder.layer.0.output.dense.weight.scale",
        "  bert.encoder.layer.1.intermediate.dense.weight: [24, 16] with a scale of float32 [7]: one float per row",
        "  bert.encoder.layer.1.output.dense.bias: missing, expected [16]",
        "  bert.encoder.layer.2.output.dense.bias: unexpected, [3]",
    ]


def test_checkpoint_with_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["embeddings.LayerNorm.gamma"] = torch.randn(16)
    with pytest.raises(CheckpointError, match=r"two names: .*embeddings\.LayerNorm"):
        load_model(write(tmp_path, tensors))


def test_load_model_of_a_bare_encoder_points_to_load_encoder(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(span_head=False))
    with pytest.raises(CheckpointError, match=r"qa_outputs\.bias: missing(.|\n)* load_encoder"):
        load_model(tmp_path)
    load_encoder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_infinity_in_weights_is_an_error_that_names_the_tensors(tmp_path: Path, value: float) -> None:
    tensors = make_tensors()
    broken = ["bert.encoder.layer.1.attention.self.value.weight", "qa_outputs.bias"]
    for name in broken:
        tensors[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"NaN.* in {', '.join(broken)}$"):
        load_model(write(tmp_path, tensors))


def test_value_beyond_float16_is_an_error_in_float16_alone(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["qa_outputs.bias"][0] = 1e6
    write(tmp_path, tensors)
    assert load_model(tmp_path).span.bias[0] == 1e6
    with pytest.raises(CheckpointError, match=r"too large .* in qa_outputs\.bias$"):
        load_model(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_weights_are_rounded_to_the_dtype_and_held_in_it_or_in_float32(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    asked: torch.dtype | None,
    native: bool,
) -> None:
    monkeypatch.setattr(dtbert.kernels.cpu, "multiplies_natively", lambda dtype: native or dtype == torch.float32)
    tensors = {name: tensor.to(stored) for name, tensor in make_tensors().items()}
    model = load_model(write(tmp_path, tensors), dtype=asked)
    precision = asked or torch.float32
    held = precision if native else torch.float32
    assert model.dtype == held
    assert_same(hub_tensors(model), {name: tensor.to(precision).to(held) for name, tensor in tensors.items()})


def test_graphs_without_a_gpu_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="graphs=True needs the backend 'triton' on a GPU, not 'cpu' on cpu"):
        load_model("no/such-folder.bin", graphs=True)
    assert load_model(graphs=False).backend_name == "cpu"


@pytest.mark.parametrize("device", ["cuda:9", "meta", "toaster", "mps:3"])
def test_device_that_is_not_there_is_an_error_before_anything_is_read(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}'"):
        load_model("no/such-folder.bin", device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, "float32"])
def test_other_dtype_is_an_error_before_anything_is_read(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^dtype .*torch\.float32, .*, torch\.int8 or torch\.float8_e4m3fn, not"):
        load_encoder("no/such-folder.bin", dtype=dtype)


def test_unknown_backend_is_an_error_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="backend 'gpu'"):
        load_model("no/such-folder.bin", backend="gpu")  # type: ignore[arg-type]


def test_loaded_model_survives_its_file_being_cut_and_replaced(tmp_path: Path) -> None:
    for form in ("model.safetensors", "pytorch_model.bin"):
        folder = write(tmp_path / form, make_tensors(), form)
        model = load_model(folder, backend="reference")
        before = model(IDS).start_logits
        with (folder / form).open("r+b") as file:
            file.truncate(0)
        assert torch.equal(model(IDS).start_logits, before)


def test_file_replaced_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    # So large that it is mapped anew after the first tensor.
    large = torch.zeros(20 * 2**20, dtype=torch.uint8)
    opened = open_checkpoint(write(tmp_path, {**make_tensors(), "large": large}))
    opened.file.read("large")
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path, make_tensors())
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed"):
        opened.file.read("qa_outputs.weight")


def test_missing_parts_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights: .* model\.safetensors, .* found nothing"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"found notes\.txt"):
        load_model(tmp_path)
    write(tmp_path, make_tensors())
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"notes\.txt: .*\.safetensors .*\.bin"):
        load_model(tmp_path / "notes.txt")


def test_config_that_does_not_fit_is_an_error_that_names_its_file(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(), hidden_act="mish")
    with pytest.raises(ValueError, match=r"config\.json: .*hidden_act 'mish'"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "source", ["/no/such", "./no", "../no", "no/such/thing", "no/", "model.safetensors", "a/b.bin"]
)
def test_path_that_does_not_exist_is_an_error_that_names_it(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: {re.escape(repr(source))}"):
        resolve_source(source)


def test_path_object_is_never_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder: 'org/name'"):
        resolve_source(Path("org/name"))


def test_what_exists_on_the_disk_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "name", make_tensors())
    assert resolve_source("org/name") == Path("org/name")
    with pytest.raises(ValueError, match="revision 'main'"):
        resolve_source("org/name", "main")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [("", ValueError, "empty"), ("  ", ValueError, "empty"), (3, TypeError, "not int"), (b"x", TypeError, "not bytes")],
)
def test_source_that_is_neither_path_nor_id_is_an_error(source: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^source .*{message}"):
        resolve_source(source)  # type: ignore[arg-type]


def test_shape_of_the_tiny_checkpoint_is_the_configs(tmp_path: Path) -> None:
    # Guards the oracle above: transformers builds the same names and shapes.
    import transformers

    theirs = transformers.BertForQuestionAnswering(transformers.BertConfig(**CONFIG)).state_dict()
    assert {name: tensor.shape for name, tensor in make_tensors().items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


HEADS = {
    "classifier": {"classifier.weight": torch.zeros(3, 16), "classifier.bias": torch.zeros(3)},
    "projection": {"linear.weight": torch.zeros(8, 16)},
    "crf": {"crf.transitions": torch.zeros(3, 3)},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_encoder_is_loaded_from_under_any_head_which_the_log_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, head: dict[str, torch.Tensor]
) -> None:
    tensors = make_tensors(span_head=False)
    alone = load_encoder(write(tmp_path / "alone", tensors))
    encoder = load_encoder(write(tmp_path / "headed", tensors | head))
    assert torch.equal(encoder(IDS).last_hidden_state, alone(IDS).last_hidden_state)
    assert ", ".join(sorted(head)) in caplog.text
    with pytest.raises(CheckpointError, match=f"{min(head)}: unexpected"):
        load_model(write(tmp_path / "both", make_tensors() | head))
    with pytest.raises(CheckpointError, match=r"bert\.extra: unexpected"):
        load_encoder(write(tmp_path / "extra", make_tensors(span_head=False) | {"bert.extra": torch.zeros(1)}))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.module."])
def test_prefix_of_every_name_is_taken_off(tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str) -> None:
    tensors = make_tensors()
    want = load_model(write(tmp_path / "plain", tensors))(IDS)
    prefixed = {prefix + name: tensor for name, tensor in tensors.items()}
    got = load_model(write(tmp_path / "prefixed", prefixed))(IDS)
    assert torch.equal(got.start_logits, want.start_logits)
    assert repr(prefix) in caplog.text


@pytest.mark.parametrize("prefix", ["bert_model.", "encoder.", "model.backbone.", "0.auto_model."])
def test_encoder_is_found_under_a_name_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    tensors = make_tensors(pooler=True)
    renamed = {name.replace("bert.", prefix): tensor for name, tensor in tensors.items()}
    folder = write(tmp_path, renamed | {"classifier.weight": torch.zeros(3, 16)})
    bare = {name: tensor for name, tensor in tensors.items() if "qa_outputs" not in name}
    assert_same(hub_tensors(load_encoder(folder)), bare)
    assert f"names begin with the prefix {prefix!r}" in caplog.text
    assert "without classifier.weight" in caplog.text
    with pytest.raises(CheckpointError, match=r"classifier\.weight: unexpected"):
        load_model(folder)


def test_one_of_two_encoders_is_not_chosen(tmp_path: Path) -> None:
    towers = {f"{tower}.{name}": tensor for tower in ("left", "right") for name, tensor in make_tensors().items()}
    with pytest.raises(CheckpointError, match=r"left\.bert\.embeddings\.LayerNorm\.bias: unexpected"):
        load_model(write(tmp_path, towers))


def test_no_message_advises_to_run_what_a_pickle_holds(tmp_path: Path) -> None:
    folder = write(tmp_path, make_tensors())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a whole pickle of tensors") as caught:
        load_model(folder)
    assert "weights_only" not in str(caught.value)
