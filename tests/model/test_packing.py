"""Packed batches: round trips, and bad input refused before any work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtbert.model import PackedBatch, pack_padded, unpack


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**16))
def test_pack_then_unpack_gives_real_tokens_back(batch: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 100, (batch, length), generator=generator)
    mask = torch.randint(0, 2, (batch, length), generator=generator)
    mask[:, -1] = 1
    packed, rows = pack_padded(ids, mask, ids % 2)
    assert torch.equal(unpack(packed.input_ids, rows, ids.shape, 0), ids * mask)
    assert torch.equal(unpack(packed.token_type_ids, rows, ids.shape, 0), ids % 2 * mask)
    assert packed.packing.seqlens == tuple(mask.sum(1).tolist())
    assert packed.packing.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    # A token's position is its column, wherever the padding lies.
    assert torch.equal(packed.position_ids, mask.nonzero()[:, 1])


def test_pack_lists_equals_pack_padded() -> None:
    from_lists = PackedBatch.from_lists([[5, 6, 7], [8]], [[0, 0, 1], [1]])
    padded, _ = pack_padded(
        torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[0, 0, 1], [1, 0, 0]])
    )
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(getattr(from_lists, name), getattr(padded, name))
    assert torch.equal(from_lists.packing.cu_seqlens, padded.packing.cu_seqlens)


IDS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (([[1, 2]],), TypeError, "input_ids .* integers .*not list"),
        ((IDS.float(),), TypeError, "input_ids .* not of torch.float32"),
        ((IDS[0],), ValueError, r"input_ids .*\[B, S\].* not \[3\]"),
        ((IDS[:, :0],), ValueError, r"input_ids .* not \[2, 0\]"),
        ((IDS, IDS[:, :2]), ValueError, r"attention_mask has shape \[2, 2\].*input_ids \[2, 3\]"),
        ((IDS, None, IDS[:1]), ValueError, r"token_type_ids has shape \[1, 3\]"),
        ((IDS, IDS * 2), ValueError, "attention_mask .* 1 "),
        ((IDS, IDS.float() * 0.5), ValueError, "attention_mask .* 1 "),
        ((IDS, torch.tensor([[1, 1, 0], [0, 0, 0]])), ValueError, "row 1 of attention_mask"),
        ((IDS, None, IDS.float()), TypeError, "token_type_ids .* not of torch.float32"),
    ],
)
def test_pack_padded_refuses_bad_input(inputs: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_padded(*inputs)  # type: ignore[arg-type]


def test_pack_lists_refuses_empty_and_mismatched_sequences() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        PackedBatch.from_lists([])
    with pytest.raises(ValueError, match=r"lengths \[2, 0\]"):
        PackedBatch.from_lists([[1, 2], []])
    with pytest.raises(ValueError, match="must match"):
        PackedBatch.from_lists([[1, 2]], [[0]])
