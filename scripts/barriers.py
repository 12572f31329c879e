"""A rule for Hopper's kernels, read from their PTX: no copy overwrites shared memory that a product may still read.

A ``wgmma`` reads shared memory on its own; a warpgroup that waits for it knows of its own products alone. So a slot of
shared memory may be filled again (``cp.async``) only after a ``bar.sync`` that follows the wait for the products that
read it. Within a loop a slot was read in the iteration before: the rule is broken where a path from that iteration's
wait to the copy passes no ``bar.sync``. Outside it, where slots are shared at will, any such path breaks it.
"""

import re
from typing import NamedTuple

_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"^(@\S+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)")
_WAIT = re.compile(r"^wgmma\.wait_group\.sync\.aligned\s+(\d+)")


class _Block(NamedTuple):
    instructions: list[str]
    successors: list[int]


class _Waited(NamedTuple):
    """Products that were waited for, but by this warpgroup alone: by which block, how many iterations ago."""

    block: int
    ago: int


def barrier_problem(ptx: str) -> str:
    """The first ``cp.async`` that breaks the rule, and why; empty if none does."""
    blocks = _blocks(ptx)
    back = _back_edges(blocks)
    loops = [_loop(blocks, *edge) for edge in back]
    arriving: list[set[_Waited]] = [set() for _ in blocks]
    changed = set(range(len(blocks)))
    while changed:
        here = changed.pop()
        waited = set(arriving[here])
        for instruction in blocks[here].instructions:
            found = _WAIT.match(instruction)
            if instruction.startswith("bar.sync"):
                waited.clear()
            elif found:
                # Where products may go on, those that are done are an iteration old.
                waited.add(_Waited(here, int(found[1] != "0")))
            elif instruction.startswith("cp.async.c"):
                for block, ago in waited:
                    together = any({block, here} <= loop for loop in loops)
                    if ago or not together:
                        return f"no bar.sync between a wgmma.wait_group and {instruction.split(' [')[0]}"
        for there in blocks[here].successors:
            ago = (here, there) in back
            leaving = {_Waited(block, min(1, before + ago)) for block, before in waited}
            if not leaving <= arriving[there]:
                arriving[there] |= leaving
                changed.add(there)
    return ""


def _blocks(ptx: str) -> list[_Block]:
    """The basic blocks of the one function, in the order of the text; each names those that may follow."""
    named: dict[str, int] = {}
    found: list[list[str]] = [[]]
    for line in map(str.strip, ptx.splitlines()):
        label = _LABEL.match(line)
        if label:
            found.append([])
            named[label[1]] = len(found) - 1
        elif line and not line.startswith(("//", ".", "$")):
            found[-1].append(line)
            if _BRANCH.match(line):
                found.append([])
    blocks = []
    for index, instructions in enumerate(found):
        last = instructions[-1] if instructions else ""
        branch = _BRANCH.match(last)
        successors = [named[branch[2]]] if branch else []
        if not (last.startswith("ret") or (branch and not branch[1])) and index + 1 < len(found):
            successors.append(index + 1)
        blocks.append(_Block(instructions, successors))
    return blocks


def _back_edges(blocks: list[_Block]) -> set[tuple[int, int]]:
    """The edges that close a loop, from its last block to its first."""
    found: set[tuple[int, int]] = set()
    done: set[int] = set()
    path: list[tuple[int, list[int]]] = [(0, list(blocks[0].successors))]
    while path:
        here, left = path[-1]
        if not left:
            done.add(here)
            path.pop()
            continue
        there = left.pop()
        if any(there == block for block, _ in path):
            found.add((here, there))
        elif there not in done:
            path.append((there, list(blocks[there].successors)))
    return found


def _loop(blocks: list[_Block], last: int, first: int) -> set[int]:
    """The blocks of the loop that this edge closes."""
    inside, left = {first, last}, [last]
    while left:
        here = left.pop()
        if here == first:
            continue
        for block, (_, successors) in enumerate(blocks):
            if here in successors and block not in inside:
                inside.add(block)
                left.append(block)
    return inside
