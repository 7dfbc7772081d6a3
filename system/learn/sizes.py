"""Sizes that the learner works with and the memory plan counts on."""

import math

BLOCK = 128  # FlexAttention's default block edge; packed rows are padded to a multiple of it on GPU
LOGITS = 1 << 27  # logits of one rank that exist at one time: 256 MiB in bfloat16
CPU_BLOCK = 16  # the same on CPU, where attention works on queries, not on blocks: less padding
STAGED = 1 << 26  # parameters on their way between GPU and host at one time: 256 MiB of gradients


def context_block(tp: int, sequence_parallel: bool, *, gpu: bool) -> int:
    """Tokens of the blocks in which a row is dealt to context-parallel ranks; ``learn.micro_tokens`` has one
    for each of them at least.
    """
    block = BLOCK if gpu else CPU_BLOCK
    # A rank's tokens are spread over the tensor-parallel ranks.
    return math.lcm(block, tp) if sequence_parallel else block
