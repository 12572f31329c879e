"""Models whose layers multiply in int8: loaded, moved, saved, refused."""

import copy
import logging
import pickle
from pathlib import Path

import pytest
import torch

from dtbert.kernels import native
from dtbert.kernels.parameters import Linear
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.weights import convert, load_model, save_model

SIZES = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=50)
SCHEDULE = LengthSchedule.ratios([0.6, 0.3], scorer="answer")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = BertForQuestionAnswering(SIZES)
    model.reset_parameters(torch.Generator().manual_seed(0))
    return save_model(model, tmp_path_factory.mktemp("int8") / "float")


def batch_of(*lengths: int) -> PackedBatch:
    ids = [[(7 * i + n) % 50 for i in range(n)] for n in lengths]
    return PackedBatch.from_lists(ids, [[int(i > 3) for i in one] for one in ids])


def linears(model: BertForQuestionAnswering) -> list[Linear]:
    return [module for module in model.encoder.modules() if isinstance(module, Linear)]


def test_a_file_in_int8_and_the_floats_it_was_made_of_give_the_same_model(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "int8", int8=True)
    of_file, of_floats = (
        load_model(path, dtype=torch.int8, backend="reference") for path in (tmp_path / "int8", source)
    )
    assert of_file.product_dtype == torch.int8
    assert load_model(source).product_dtype != torch.int8
    for one, other in zip(linears(of_file), linears(of_floats), strict=True):
        assert one.weight.dtype == torch.int8
        assert one.scale is not None
        assert other.scale is not None
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.scale, other.scale)
    assert of_file.span.weight.is_floating_point()


@pytest.mark.parametrize("schedule", [None, SCHEDULE])
def test_logits_are_near_those_in_float32(source: Path, schedule: LengthSchedule | None) -> None:
    batch = batch_of(5, 40, 17)
    got = load_model(source, dtype=torch.int8, backend="reference").forward_packed(batch, None)
    want = load_model(source, backend="reference").forward_packed(batch, None)
    for one, other in zip(got, want, strict=True):
        assert (one.float() - other).abs().max() < 0.05 * other.abs().max()
    dropped = load_model(source, dtype=torch.int8, backend="reference").forward_packed(batch, schedule)
    assert all(logits.isfinite().all() for logits in dropped)


def test_batch_mates_change_nothing(source: Path) -> None:
    model, lengths = load_model(source, dtype=torch.int8, backend="reference"), (5, 40, 17)
    together = model.forward_packed(batch_of(*lengths), SCHEDULE)
    alone = [model.forward_packed(batch_of(length), SCHEDULE) for length in lengths]
    for side, all_of_it in enumerate(together):
        parts = torch.cat([one[side] for one in alone])
        assert (all_of_it.float() - parts.float()).abs().max() <= 1e-2 * parts.float().abs().max()


@pytest.mark.usefixtures("int8_steps")
class TestCompiled:
    def test_agrees_with_the_specification(self, source: Path) -> None:
        batch = batch_of(5, 40, 17)
        got, want = (
            load_model(source, dtype=torch.int8, backend=name).forward_packed(batch) for name in ("native", "reference")
        )
        for one, other in zip(got, want, strict=True):
            assert (one.float() - other.float()).abs().max() < 0.02 * other.float().abs().max()

    def test_weights_take_a_byte_each(self, source: Path) -> None:
        model = load_model(source, dtype=torch.int8, backend="native")
        assert model.backend_name == "native"
        for layer in linears(model):
            assert layer.laid_out
            # With scale and sum of each output, of a multiple of 64.
            assert layer.weight.untyped_storage().nbytes() <= layer.plain_weight.numel() * 1.34 + 64 * 8
            assert layer.weight.untyped_storage().nbytes() == -(-len(layer.bias) // 64) * 64 * (
                layer.plain_weight.shape[1] + 8
            )

    def test_a_layout_is_no_identity(self, source: Path, tmp_path: Path) -> None:
        model, batch = load_model(source, dtype=torch.int8, backend="native"), batch_of(9, 30)
        want = model.forward_packed(batch, SCHEDULE)
        saved = load_model(save_model(model, tmp_path / "again"), dtype=torch.int8, backend="native")
        fresh = load_model(source, dtype=torch.int8, backend="native")
        fresh.load_state_dict(model.state_dict())
        floats = load_model(source, dtype=model.dtype, backend="native")
        floats.load_state_dict(model.state_dict())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh, floats, saved):
            assert other.product_dtype == torch.int8
            assert all(layer.laid_out for layer in linears(other))
            for one, logits in zip(other.forward_packed(batch, SCHEDULE), want, strict=True):
                assert torch.equal(one, logits)

    def test_states_may_change_their_dtype(self, source: Path) -> None:
        model = load_model(source, dtype=torch.int8, backend="native").to(torch.float32)
        assert model.product_dtype == torch.int8
        assert model.dtype == torch.float32
        assert all(layer.scale is not None and layer.scale.dtype == torch.float32 for layer in linears(model))
        assert model.forward_packed(batch_of(9)).start_logits.dtype == torch.float32

    def test_it_is_the_default_where_it_was_measured_faster(
        self, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for ratio, in_int8 in ((0.5, True), (1.2, False)):
            native.pays.cache_clear()
            monkeypatch.setattr(native, "verdict", lambda ratio=ratio: {"torch.int8": ratio})
            with caplog.at_level(logging.WARNING):
                assert (load_model(source, dtype=torch.int8).product_dtype == torch.int8) is in_int8
        native.pays.cache_clear()
        assert "dtype torch.int8: `dtbert build` has not found it faster here; computed in float32" in caplog.text


def test_without_compiled_steps_it_says_so_and_computes_in_float32(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.pays.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = load_model(source, dtype=torch.int8)
    native.pays.cache_clear()
    assert model.product_dtype != torch.int8
    assert model.dtype == torch.float32
    assert "its steps were not compiled for this torch and processor (run `dtbert build`)" in caplog.text


def test_weights_in_int8_become_floats_again_by_a_state_of_floats(source: Path) -> None:
    model, floats = (load_model(source, dtype=dtype, backend="reference") for dtype in (torch.int8, torch.float32))
    model.load_state_dict(floats.state_dict())
    assert model.product_dtype != torch.int8
    assert torch.equal(model.encoder.layers[0].qkv.weight, floats.encoder.layers[0].qkv.weight)


def test_what_cannot_be_is_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="computed on a CPU by the backend 'native', not on cpu by the backend 'cpu'"):
        load_model(source, dtype=torch.int8, backend="cpu")
    with pytest.raises(ValueError, match=r"weights in torch\.int8 cannot be trained: load the model in another dtype"):
        load_model(source, dtype=torch.int8, backend="reference").requires_grad_(True)
