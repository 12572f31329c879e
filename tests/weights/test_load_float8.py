"""Models whose layers multiply in fp8: loaded, moved, saved, refused; a CPU emulates them."""

import copy
import logging
from pathlib import Path

import pytest
import torch

from dtbert.kernels import Sizes, choose_backend, get_backend
from dtbert.kernels import triton as kernels
from dtbert.kernels.float8 import FLOAT8, scale_rows
from dtbert.kernels.parameters import Linear
from dtbert.kernels.triton import float8
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule
from dtbert.profiling import random_model
from dtbert.weights import convert, load_model, save_model
from tests.weights.test_load_int8 import SCHEDULE, SIZES, batch_of, linears


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = BertForQuestionAnswering(SIZES)
    model.reset_parameters(torch.Generator().manual_seed(0))
    return save_model(model, tmp_path_factory.mktemp("float8") / "float")


def load(source: Path) -> BertForQuestionAnswering:
    return load_model(source, dtype=FLOAT8, backend="reference")


def test_matrices_of_the_layers_are_in_fp8_alone(source: Path) -> None:
    model, floats = load(source), load_model(source, backend="reference")
    assert model.product_dtype == FLOAT8
    assert floats.product_dtype == floats.dtype == torch.float32
    assert model.dtype == load_model(source, dtype=torch.bfloat16).dtype
    for one, other in zip(linears(model), linears(floats), strict=True):
        want = scale_rows(other.weight)
        assert one.scale is not None
        assert torch.equal(one.weight.view(torch.uint8), want.values.view(torch.uint8))
        assert torch.equal(one.scale, want.scale.squeeze(1))
    assert model.span.weight.dtype == model.dtype


def test_a_file_of_int8_is_rounded_from_what_it_means(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "int8", int8=True)
    for one, other in zip(linears(load(folder)), linears(load_model(folder, backend="reference")), strict=True):
        assert torch.equal(one.weight.view(torch.uint8), scale_rows(other.weight).values.view(torch.uint8))


@pytest.mark.parametrize("schedule", [None, LengthSchedule.ratios([0.6, 0.3], scorer="random")])
def test_logits_are_near_those_in_float32(source: Path, schedule: LengthSchedule | None) -> None:
    batch = batch_of(5, 40, 17)
    got = load(source).forward_packed(batch, schedule)
    want = load_model(source, backend="reference").forward_packed(batch, schedule)
    for one, other in zip(got, want, strict=True):
        assert (one.float() - other).abs().max() < 0.1 * other.abs().max()


def test_a_cpu_emulates_it_and_says_so(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load_model(source, dtype=FLOAT8)
    assert "dtype torch.float8_e4m3fn: emulated on a CPU, slower than float32" in caplog.text
    assert model.product_dtype == FLOAT8
    assert model.backend_name == "cpu"
    got, want = (one.forward_packed(batch_of(5, 40)).start_logits for one in (model, load(source)))
    assert (got.float() - want.float()).norm() <= 0.05 * want.float().norm()


def test_a_copy_a_move_and_another_dtype_of_the_states_keep_what_is_meant(source: Path) -> None:
    model, batch = load(source), batch_of(9, 30)
    want = model.forward_packed(batch, SCHEDULE)
    fresh, floats = load(source), load_model(source, dtype=model.dtype, backend="reference")
    for other in (fresh, floats):
        other.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), fresh, floats, copy.deepcopy(model).cpu()):
        assert other.product_dtype == FLOAT8
        for one, logits in zip(other.forward_packed(batch, SCHEDULE), want, strict=True):
            assert torch.equal(one, logits)
    # fp8 is a floating type to torch, and would lose its scale.
    moved = copy.deepcopy(model).to(torch.float32)
    assert (moved.dtype, moved.product_dtype) == (torch.float32, FLOAT8)
    for one, other in zip(linears(moved), linears(model), strict=True):
        assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
    logits = moved.forward_packed(batch).start_logits
    assert (logits - model.forward_packed(batch).start_logits.float()).norm() <= 0.05 * logits.norm()


def test_a_state_of_floats_makes_floats_of_it(source: Path) -> None:
    model, floats = load(source), load_model(source, backend="reference")
    model.load_state_dict(floats.state_dict())
    assert model.product_dtype != FLOAT8
    assert torch.equal(model.encoder.layers[0].qkv.weight, floats.encoder.layers[0].qkv.weight)


def test_saved_it_is_the_floats_that_it_means(source: Path, tmp_path: Path) -> None:
    model = load(source)
    folder = save_model(model, tmp_path / "saved")
    for one, other in zip(linears(model), linears(load_model(folder, backend="reference")), strict=True):
        assert one.scale is not None
        assert torch.equal(one.weight.float() * one.scale[:, None], other.weight)
    for one, other in zip(linears(model), linears(load(folder)), strict=True):
        assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))


def test_sizes_that_16_does_not_divide_stay_in_bfloat16(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, vocab_size=50)
    model = BertForQuestionAnswering(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        model = load(save_model(model, tmp_path / "odd"))
    names = [layer.name for layer in linears(model) if layer.scale is None]
    assert names == ["intermediate", "output"]
    odd = "encoder.layers.0.intermediate, encoder.layers.0.output"
    assert f"of sizes that 16 does not divide, and so not multiplied in fp8: {odd}" in caplog.text
    assert model.forward_packed(batch_of(9)).start_logits.isfinite().all()


def test_a_random_model_has_it_too() -> None:
    model = random_model(1, 24, dtype=FLOAT8, backend="reference")
    assert model.product_dtype == model.dtype  # 24 is no multiple of 16
    assert random_model(1, 48, dtype=FLOAT8, backend="reference").product_dtype == FLOAT8


def test_what_cannot_be_is_refused(source: Path) -> None:
    with pytest.raises(
        ValueError, match=r"weights in torch\.float8_e4m3fn cannot be trained: load the model in another dtype"
    ):
        load(source).requires_grad_(True)
    with pytest.raises(ValueError, match="the backend 'native'"):
        load_model(source, dtype=FLOAT8, backend="native")
    with pytest.raises(ValueError, match="the backend 'triton' runs on a GPU"):
        load_model(source, dtype=FLOAT8, backend="triton")


@pytest.fixture
def _asked_anew() -> None:
    float8.why_not_float8.cache_clear()
    yield
    float8.why_not_float8.cache_clear()


NEEDED = "^the backend 'triton' multiplies in fp8 on an NVIDIA GPU of compute capability 8.9 or more, "


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("capability", "right", "hip", "reason"),
    [
        ((8, 0), True, None, "and cuda is of 8.0"),
        ((9, 0), False, None, rf"where those of torch {torch.__version__} are wrong on cuda".replace("+", r"\+")),
        ((9, 4), True, "7.0", "not on one of AMD"),
        ((12, 0), None, None, ".* does not on cuda: CUBLAS_STATUS_NOT_SUPPORTED"),
    ],
    ids=["older", "wrong", "AMD", "no kernel"],
)
def test_a_gpu_without_products_in_fp8_is_refused(
    capability: tuple[int, int],
    right: bool | None,
    hip: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_right(_: torch.device) -> bool:
        if right is None:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")
        return right

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(float8, "_is_right", is_right)
    with pytest.raises(ValueError, match=f"{NEEDED}{reason}: give bfloat16$"):
        choose_backend("cuda", "triton", Sizes(FLOAT8))
    # Where a model moves there, the plain steps emulate it.
    assert choose_backend("cuda", None, Sizes(FLOAT8)) == "reference"


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_a_gpu_with_right_products_in_fp8_takes_them(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(float8, "_is_right", lambda _: True)
    assert type(get_backend("cuda", None, Sizes(FLOAT8))) is kernels.Float8


def test_every_product_of_the_encoder_is_meant(source: Path) -> None:
    model = load(source)
    held = [module for module in model.modules() if isinstance(module, Linear) and module.scale is not None]
    assert len(held) == 4 * SIZES.num_hidden_layers
