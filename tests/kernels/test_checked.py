"""The public steps: the same numbers as the steps of a backend, and every wrong input refused."""

import sys

import pytest
import torch
from torch import Tensor

from dtbert import kernels
from dtbert.kernels import ATTENTION_SCORES, Backend, Kept, Sizes, TokenIds, choose_backend, get_backend
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear, of_tensors
from dtbert.model import BertForQuestionAnswering
from tests.kernels.packings import packing
from tests.peer import make_config, make_dtbert, make_peer

H, T, K, N = 24, 9, 4, 3


NAMES = [
    *("embed_layer_norm", "linear", "linear_gelu", "linear_add_layer_norm"),
    *("attention", "attention_significance", "select_tokens", "restore"),
]


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(step: str) -> dict[str, object]:
    """A right call: sequences of 5, 0 and 4 tokens, of which 2, 0 and 2 are kept."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    keep_indices = torch.tensor([0, 3, 6, 8])
    norm = {"norm_weight": rand(H), "norm_bias": rand(H), "eps": 1e-5}
    product = {"x": rand(K, H), "weight": rand(H, H), "bias": rand(H)}
    packing = {"cu_seqlens": offsets(0, 5, 5, 9), "max_seqlen": 5}
    attended = {"qkv": rand(T, 3 * H), **packing, "num_heads": N}
    ids = {name: torch.arange(T) % 2 for name in ("input_ids", "position_ids", "token_type_ids")}
    return {
        "embed_layer_norm": {**ids, "word": rand(7, H), "position": rand(9, H), "token_type": rand(2, H), **norm},
        "linear": product,
        "linear_gelu": product,
        "linear_add_layer_norm": {**product, "residual": rand(T, H), **norm, "keep_indices": keep_indices},
        "attention": {**attended, "query_indices": keep_indices, "cu_seqlens_q": offsets(0, 2, 2, 4)},
        "attention_significance": {**attended, "kind": "from_question", "token_type_ids": torch.arange(T) % 2},
        "select_tokens": {
            "significance": rand(T),
            **packing,
            "next_cu_seqlens": offsets(0, 2, 2, 4),
            "num_kept": 4,
        },
        "restore": {"states": rand(T, H), "keep_indices": keep_indices, "kept_states": rand(K, H)},
    }[step]


def call(step: str, **changed: object) -> object:
    return getattr(kernels, step)(**{**arguments(step), **changed})


def refuses(step: str, message: str, error: type[Exception] = ValueError, **changed: object) -> None:
    with pytest.raises(error, match=message):
        call(step, **changed)


def expected(step: str, backend: Backend) -> object:
    """What the right call gives, by the backend's own step."""
    x = arguments(step)
    part = lambda kind, *names: of_tensors(kind, **{name: x[name] for name in names})  # noqa: E731
    norm = None
    if "eps" in x:
        norm = of_tensors(LayerNorm, weight=x["norm_weight"], bias=x["norm_bias"], eps=x["eps"])
    now, kept = packing([5, 0, 4]), packing([2, 0, 2])
    if step == "embed_layer_norm":
        tables = part(Embeddings, "word", "position", "token_type")
        tables.norm = norm
        return backend.embed(TokenIds(x["input_ids"], x["token_type_ids"], x["position_ids"]), tables)
    if step == "attention":
        return backend.attention(x["qkv"], now, N, Kept(x["query_indices"], kept)), None
    if step == "attention_significance":
        return backend.significance(x["qkv"], now, N, x["kind"], x["token_type_ids"])
    if step == "select_tokens":
        return backend.select(x["significance"], now, kept).rows
    if step == "restore":
        return backend.scatter(x["states"], x["keep_indices"], x["kept_states"])
    layer = part(Linear, "weight", "bias")
    if step == "linear_add_layer_norm":
        return backend.add_norm(x["x"], layer, x["residual"], norm, x["keep_indices"])
    return backend.linear(x["x"], layer, "gelu" if step == "linear_gelu" else None)


@pytest.mark.parametrize("step", NAMES)
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_step_gives_what_its_backend_gives(backend: str | None, step: str) -> None:
    torch.testing.assert_close(call(step, backend=backend), expected(step, Backend()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", NAMES)
def test_step_is_public(step: str) -> None:
    assert step in kernels.__all__
    assert getattr(kernels, step).__doc__


@pytest.mark.parametrize("kind", ATTENTION_SCORES)
def test_attention_gives_every_score(kind: str) -> None:
    changed = {"query_indices": None, "cu_seqlens_q": None, "token_type_ids": torch.zeros(T, dtype=torch.int64)}
    context, significance = call("attention", significance=kind, **changed)
    want = call("attention_significance", kind=kind, token_type_ids=changed["token_type_ids"], backend="reference")
    assert context.shape == (T, H)
    torch.testing.assert_close(significance, want, atol=1e-5, rtol=1e-5)


def test_restore_leaves_its_input_as_it_is() -> None:
    states = arguments("restore")["states"]
    before = states.clone()
    assert not torch.equal(call("restore", states=states), before)
    assert torch.equal(states, before)


def test_steps_are_differentiable_where_gradients_are_needed() -> None:
    weight = arguments("linear_gelu")["weight"].requires_grad_()
    call("linear_gelu", weight=weight).sum().backward()
    assert weight.grad is not None
    refuses("linear_gelu", "gradients .* 'cpu'", weight=weight, backend="cpu")
    with torch.no_grad():
        call("linear_gelu", weight=weight, backend="cpu")


def test_steps_take_no_sequence_and_no_token() -> None:
    empty = {"cu_seqlens": offsets(0), "max_seqlen": 0}
    context, _ = call("attention", qkv=torch.zeros(0, 3 * H), query_indices=None, cu_seqlens_q=None, **empty)
    assert context.shape == (0, H)
    kept = call("select_tokens", significance=torch.zeros(0), next_cu_seqlens=offsets(0), num_kept=0, **empty)
    assert kept.shape == (0,)


OFFSETS = [
    (offsets(1, 5, 5, 9), "cu_seqlens starts at 1"),
    (offsets(0, 5, 4, 9), "cu_seqlens falls from 5 to 4 at sequence 1"),
    (offsets(0, 5, 5, 8), "cu_seqlens ends at 8, (qkv|significance) has 9"),
    (offsets(0, 6, 6, 9), "max_seqlen is 5, .* 6 tokens"),
]


@pytest.mark.parametrize("step", ["attention", "attention_significance", "select_tokens"])
@pytest.mark.parametrize(("cu_seqlens", "message"), OFFSETS, ids=["start", "falling", "end", "longest"])
def test_offsets_that_do_not_fit_are_refused(step: str, cu_seqlens: Tensor, message: str) -> None:
    refuses(step, f"{step}: {message}", cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("step", ["attention", "attention_significance", "select_tokens"])
def test_offsets_of_another_kind_are_refused(step: str) -> None:
    refuses(step, r"cu_seqlens is torch.int64, expected torch.int32", TypeError, cu_seqlens=torch.tensor([0, 5, 5, 9]))
    refuses(step, r"cu_seqlens is empty", cu_seqlens=offsets())
    refuses(step, r"cu_seqlens has shape \[1, 4\], expected \[any\]", cu_seqlens=offsets(0, 5, 5, 9)[None])
    refuses(step, "cu_seqlens is on meta", cu_seqlens=offsets(0, 5, 5, 9).to("meta"))


@pytest.mark.parametrize("step", ["linear_add_layer_norm", "restore"])
def test_keep_indices_that_do_not_fit_are_refused(step: str) -> None:
    for wrong in ([0, 3, 6, 9], [-1, 3, 6, 8]):
        message = f"keep_indices holds {9 if 9 in wrong else -1}, .* 0 to 8"
        refuses(step, message, keep_indices=torch.tensor(wrong))
    refuses(step, "keep_indices .* 6 comes before 3", keep_indices=torch.tensor([0, 6, 3, 8]))
    refuses(step, "keep_indices .* 3 comes before 3", keep_indices=torch.tensor([0, 3, 3, 8]))
    refuses(step, r"keep_indices has shape \[3\], expected \[4\]", keep_indices=torch.tensor([0, 3, 8]))
    refuses(step, "keep_indices is torch.int32", TypeError, keep_indices=torch.tensor([0, 3, 6, 8]).int())


def test_queries_of_another_sequence_are_refused() -> None:
    message = "query_indices holds 6 for sequence 0, .* sequence 2"
    refuses("attention", message, cu_seqlens_q=offsets(0, 3, 3, 4))
    refuses("attention", "cu_seqlens_q ends at 3, query_indices has 4", cu_seqlens_q=offsets(0, 2, 2, 3))
    refuses("attention", "query_indices .* 3 comes before 0", query_indices=torch.tensor([3, 0, 6, 8]))
    refuses("attention", "query_indices holds 9, .* 0 to 8", query_indices=torch.tensor([0, 3, 6, 9]))
    refuses("attention", "query_indices and cu_seqlens_q", cu_seqlens_q=None)
    refuses("attention", "significance .*query", significance="received")


@pytest.mark.parametrize("name", ["input_ids", "position_ids", "token_type_ids"])
def test_ids_outside_their_table_are_refused(name: str) -> None:
    for wrong in (-1, 9):
        ids = torch.zeros(T, dtype=torch.int64)
        ids[5] = wrong
        refuses("embed_layer_norm", f"{name} holds {wrong} at token 5, .* 0 to", **{name: ids})


def test_an_upper_bound_of_the_longest_sequence_is_taken() -> None:
    for step in ("attention", "attention_significance", "select_tokens"):
        torch.testing.assert_close(call(step, max_seqlen=7), call(step))


@pytest.mark.parametrize("step", NAMES)
def test_arguments_of_another_kind_are_refused(step: str) -> None:
    for name, value in arguments(step).items():
        if name == "kind":
            continue
        wrongs = (value.tolist(), value.numpy()) if isinstance(value, Tensor) else (torch.tensor(value),)
        for wrong in wrongs:
            refuses(step, f"{step}: {name} is (list|ndarray|Tensor), expected a ", TypeError, **{name: wrong})
    for name in ("num_heads", "max_seqlen"):
        if name in arguments(step):
            refuses(step, f"{name} is float, expected a whole number", TypeError, **{name: 3.0})
            refuses(step, f"{name} is bool, expected a whole number", TypeError, **{name: True})


def test_selections_that_do_not_fit_are_refused() -> None:
    refuses("select_tokens", "next_cu_seqlens .* sequence 1", next_cu_seqlens=offsets(0, 2, 3, 4))
    refuses("select_tokens", "next_cu_seqlens ends at 4, num_kept is 5", num_kept=5)
    significance = torch.zeros(T)
    significance[2] = float("nan")
    refuses("select_tokens", "significance is NaN at row 2", significance=significance)
    refuses("select_tokens", "significance is torch.float64", TypeError, significance=significance.double())


def test_attention_arguments_that_do_not_fit_are_refused() -> None:
    refuses("attention", "72 .* num_heads = 21", num_heads=7)
    refuses("attention", "num_heads = 0", num_heads=0)
    refuses("attention_significance", "'loudest': .* received", kind="loudest")
    refuses("attention_significance", "'from_question' needs token_type_ids", token_type_ids=None)
    refuses("attention_significance", r"token_type_ids has shape \[3\]", token_type_ids=torch.zeros(3).long())
    refuses("attention", "qkv is torch.int64", TypeError, qkv=torch.zeros(T, 3 * H).long())
    refuses("attention", "qkv .* stride 1", qkv=torch.zeros(3 * H, T).T)


@pytest.mark.parametrize("step", ["linear", "linear_gelu", "linear_add_layer_norm"])
def test_products_that_do_not_fit_are_refused(step: str) -> None:
    refuses(step, r"weight has shape \[24, 23\], expected \[any, 24\] \(out, in\)", weight=torch.zeros(H, 23))
    refuses(step, r"bias has shape \[23\], expected \[24\] \(out\)", bias=torch.zeros(23))
    refuses(step, "weight is torch.float16, x torch.float32", TypeError, weight=torch.zeros(H, H).half())
    refuses(step, "weight is on meta, the other tensors on cpu", weight=torch.zeros(H, H, device="meta"))


def test_the_backend_is_chosen_by_device_dtype_and_sizes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_backend("cpu") == "cpu"
    assert choose_backend("mps") == choose_backend("meta") == choose_backend("cpu", "reference") == "reference"
    assert choose_backend("cuda") == choose_backend("cuda", None, Sizes(torch.bfloat16, 128, 4096, 16384)) == "triton"
    for sizes in (Sizes(dtype=torch.float64), Sizes(head_size=129), Sizes(hidden_size=4097), Sizes(max_seqlen=16385)):
        assert choose_backend("cuda", None, sizes) == "reference"
    assert get_backend("cuda").name == "triton"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choose_backend("cuda") == choose_backend("cuda") == "reference"
    (warning,) = caplog.messages
    assert "pip install 'dtbert[triton]'" in warning
    with pytest.raises(ValueError, match=r"pip install 'dtbert\[triton\]'"):
        choose_backend("cuda", "triton")


def test_a_backend_that_does_not_run_there_is_refused() -> None:
    for device, sizes, message in (
        ("cpu", Sizes(), "on a GPU, and on the CPU only interpreted"),
        ("mps", Sizes(), "not on mps"),
        ("cuda", Sizes(dtype=torch.float64), "torch.float64: .* 'reference'"),
        ("cuda", Sizes(head_size=160), "128 values, not of 160"),
        ("cuda", Sizes(hidden_size=5000), "4,096 values, not of 5,000"),
        ("cuda", Sizes(max_seqlen=20000), "16,384 tokens, not of 20,000"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_backend(device, "triton", sizes)
    with pytest.raises(ValueError, match="not on cuda"):
        choose_backend("cuda", "cpu")
    with pytest.raises(ValueError, match=r"'jax': .* reference, cpu, native, triton"):
        choose_backend("cpu", "jax")


@pytest.mark.parametrize("step", NAMES)
def test_triton_kernels_refuse_tensors_on_the_cpu(step: str) -> None:
    refuses(step, "on the CPU only interpreted", backend="triton")


def test_a_model_tells_its_backend() -> None:
    peer = make_peer(make_config(layers=1))
    assert make_dtbert(peer).backend_name == "cpu"
    assert make_dtbert(peer, backend="reference").backend_name == "reference"
    assert BertForQuestionAnswering(make_dtbert(peer).config).backend_name == "reference"
    with pytest.raises(ValueError, match="on the CPU only interpreted"):
        make_dtbert(peer, backend="triton")
