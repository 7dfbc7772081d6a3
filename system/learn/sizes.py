"""Sizes that the learner works with and the memory plan counts on."""

BLOCK = 128  # FlexAttention's default block edge; packed rows are padded to a multiple of it on GPU
LOGITS = 1 << 27  # logits of one rank that exist at one time: 256 MiB in bfloat16
STAGED = 1 << 26  # parameters on their way between GPU and host at one time: 256 MiB of gradients
