"""The work of each step against counts by hand."""

from dtbert.profiling import steps
from dtbert.profiling.steps import Work

H, FLOAT = 4, 4


def test_products_read_weights_once() -> None:
    # 3 x 4 in, 4 x 5 weights, 5 biases, 3 x 5 out.
    assert steps.linear(3, 4, 5, FLOAT) == Work(2 * 3 * 4 * 5, 4 * (12 + 20 + 5 + 15))
    # In half the bytes: the same FLOPs, twice the intensity.
    half = steps.linear(3, 4, 5, 2)
    assert half.intensity == 2 * steps.linear(3, 4, 5, FLOAT).intensity


def test_residual_and_norm_add_traffic_and_no_flops() -> None:
    plain = steps.linear(3, 4, 5, FLOAT)
    added = 4 * (15 + 5 + 5)  # residual, norm's weight and bias
    assert steps.linear_add_layer_norm(3, 4, 5, FLOAT, gathered=False) == Work(plain.flops, plain.bytes + added)
    gathered = steps.linear_add_layer_norm(3, 4, 5, FLOAT, gathered=True)
    assert gathered == Work(plain.flops, plain.bytes + added + 3 * 8)


def test_attention_counts_pairs_within_each_sequence() -> None:
    pairs = 2 * 2 + 3 * 3
    # Queries, keys and values in, context out, 5 rows each.
    plain = steps.attention([2, 3], [2, 3], H, FLOAT)
    assert plain == Work(2 * 2 * pairs * H, 4 * 5 * H * FLOAT)
    scored = steps.attention([2, 3], [2, 3], H, FLOAT, significance="received")
    assert scored == Work(plain.flops, plain.bytes + 5 * 4)
    norms = steps.attention([2, 3], [2, 3], H, FLOAT, significance="value_norm")
    assert norms == Work(plain.flops + 2 * 5 * H, scored.bytes)


def test_attention_of_picked_queries_leaves_the_others_out() -> None:
    picked = steps.attention([1, 1], [2, 3], H, FLOAT, gathered=True)
    assert picked == Work(2 * 2 * (2 + 3) * H, (2 + 2 + 5 + 5) * H * FLOAT + 2 * 8)


def test_scores_alone_take_the_first_product_of_their_queries() -> None:
    cls = steps.attention_significance([1, 1], [2, 3], H, FLOAT, "cls")
    assert cls == Work(2 * (2 + 3) * H, (2 + 5) * H * FLOAT + 5 * 4)
    question = steps.attention_significance([1, 2], [2, 3], H, FLOAT, "from_question")
    assert question == Work(2 * (2 + 6) * H, (3 + 5) * H * FLOAT + 5 * 4 + 5 * 8)
    norms = steps.attention_significance([2, 3], [2, 3], H, FLOAT, "value_norm")
    assert norms == Work(2 * 13 * H + 2 * 5 * H, (5 + 5 + 5) * H * FLOAT + 5 * 4)


def test_steps_without_products_only_move_bytes() -> None:
    assert steps.select_tokens(5, 3) == Work(0, 5 * 4 + 3 * 8)
    assert steps.restore(3, H, FLOAT) == Work(0, 2 * 3 * H * FLOAT + 3 * 8)
    # Three ids a token; 5 word rows, all of the 3 positions and 2 segments, norm's weight and bias; 5 rows out.
    assert steps.embed_layer_norm(5, H, (100, 3, 2), FLOAT) == Work(0, 3 * 8 * 5 + (5 + 3 + 2 + 2 + 5) * H * FLOAT)
