"""How a tree teaches: credit, objectives, the Megatron model, and the trainer that joins them."""

import warnings

# On import megatron-core announces every GPU-only library it does without; the learner does not need them.
warnings.filterwarnings("ignore", module=r"megatron\.core")
# Its checkpoints are built on a torch class that is on its way out.
warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor", category=FutureWarning)
