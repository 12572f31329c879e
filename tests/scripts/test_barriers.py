"""The rule that copies wait for the products of every warpgroup, on small texts in PTX."""

import pytest
from barriers import barrier_problem

WAIT, ALL, COPY = (
    "wgmma.wait_group.sync.aligned 0;",
    "bar.sync 	0;",
    "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 ];",
)


def ptx(*lines: str) -> str:
    return "\n".join(
        [".visible .entry kernel(", ".param .u64 a", ")", "{", "mov.u32 %r1, 0;", *lines, "ret;", "$L__func_end0:", "}"]
    )


def loop(*body: str) -> str:
    return ptx(COPY, "@%p1 bra 	$L__BB0_2;", "$L__BB0_1:  // loop", *body, "@%p2 bra 	$L__BB0_1;", "$L__BB0_2:")


@pytest.mark.parametrize(
    "text",
    [
        ptx(COPY, ALL, WAIT),
        ptx(WAIT, ALL, COPY),
        # The slot was read an iteration ago.
        loop(ALL, WAIT, COPY),
        loop(WAIT, ALL, COPY),
        loop("wgmma.wait_group.sync.aligned 1;", ALL, COPY),
        # Both ways to the copy pass a barrier.
        loop(WAIT, "@%p3 bra 	$L__BB0_3;", ALL, "bra.uni 	$L__BB0_4;", "$L__BB0_3:", ALL, "$L__BB0_4:", COPY),
    ],
)
def test_a_copy_after_a_barrier_keeps_the_rule(text: str) -> None:
    assert barrier_problem(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        ptx(WAIT, COPY),
        ptx(ALL, WAIT, COPY),
        loop(WAIT, COPY),
        loop(COPY, ALL, WAIT),
        # Those of the iteration before are done, and no barrier has said so.
        loop(ALL, "wgmma.wait_group.sync.aligned 1;", COPY),
        # A way round the barrier.
        loop(WAIT, "@%p3 bra 	$L__BB0_3;", ALL, "$L__BB0_3:", COPY),
        # Memory is shared with the loop's.
        loop(ALL, WAIT).replace("ret;", f"{COPY}\nret;"),
    ],
)
def test_a_copy_without_a_barrier_breaks_the_rule(text: str) -> None:
    assert barrier_problem(text) == "no bar.sync between a wgmma.wait_group and cp.async.cg.shared.global"


def test_the_blocks_of_a_loop_may_stand_in_any_order() -> None:
    # As LLVM writes them: the loop's second half comes first.
    half = ("$L__BB0_3:", COPY, "@%p2 bra 	$L__BB0_2;", "bra.uni 	$L__BB0_4;", "$L__BB0_2:")
    for barrier, problem in ((ALL, False), ("", True)):
        text = ptx("bra.uni 	$L__BB0_2;", *half, barrier, WAIT, "bra.uni 	$L__BB0_3;", "$L__BB0_4:", ALL)
        assert bool(barrier_problem(text)) == problem
