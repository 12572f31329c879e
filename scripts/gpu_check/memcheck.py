"""Attention at lengths around its blocks' edges, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python -m gpu_check.memcheck --records FILE
"""

import argparse

import torch

from dtbert.kernels import Kept, Packing
from gpu_check import records
from gpu_check.turn import add_part_arguments, wait_for_turn

TOKENS = (1, 63, 128, 200)


def attend(tokens: int, device: torch.device, heads: int, head_size: int) -> None:
    """Attention of one sequence in bfloat16: its context, its scores, and some of its queries alone."""
    from dtbert.kernels.triton import Triton

    backend = Triton()
    packing, few = (Packing.stack([[count]], device)[0] for count in (tokens, (tokens + 1) // 2))
    # Its last row ends where the memory does: what is read beyond it shows.
    qkv = torch.randn(tokens, 3 * heads * head_size, device=device).bfloat16()
    segments = (torch.arange(tokens, device=device) >= 14).long()
    backend.attention(qkv, packing, heads)
    backend.attention(qkv, packing, heads, Kept(torch.arange(few.num_tokens, device=device) * 2 % tokens, few))
    backend.scored_attention(qkv, packing, heads, "received")
    for score in ("cls", "from_question"):
        significance = backend.significance(qkv, packing, heads, score, segments)
        backend.select(significance, packing, few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_part_arguments(parser)
    options = parser.parse_args()
    wait_for_turn(options.await_turn)
    device = torch.device(options.device)
    with torch.inference_mode():
        for tokens in TOKENS[:2] if options.tiny else TOKENS:
            attend(tokens, device, *((2, 16) if options.tiny else (12, 64)))
            if device.type == "cuda":
                torch.cuda.synchronize()
            # What the sanitizer found is in its own lines and its exit code.
            records.append(options.records, "memcheck", {"tokens": tokens})


if __name__ == "__main__":
    main()
