"""``espalier sft``: supervised learning on conversations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from actors.cli.command import RECIPE, argument, command, configured
from actors.cli.train import unsafe_on_resume


@command(
    RECIPE,
    argument("--resume", metavar="RUN", type=Path, help="go on with the supervised run in this directory"),
    argument("--show", metavar="N", type=int, help="print the first N conversations and what is learned"),
)
def sft(args: argparse.Namespace) -> int:
    """Teach a model by conversations, before it is trained by reinforcement.

    examples:
      espalier sft my.yaml model.path=Qwen3-8B sft.path=conversations.jsonl
      espalier train my.yaml model.path=runs/my-sft-s0/model           goes on by reinforcement
      espalier sft my.yaml sft.eval_share=0.02 sft.epochs=2 sft.lr=1e-5
      espalier sft my.yaml sft.choose=pass@4                           the epoch whose model solves most
      espalier sft configs/sft/arpo-8b.yaml                            ARPO's recipe
      espalier sft --resume runs/my-sft-s0
      espalier sft my.yaml --show 2                                    what would be learned; nothing starts
      espalier submit my.yaml --sft                                    as a SLURM job

    A row is a conversation, in one of four forms, which its columns tell:
      {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…"}
      {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "tool_calls": […]}, …]}
      {"prompt": "…", "completion": "…"}
      {"instruction": "…", "input": "…", "output": "…"}
    What the assistant says is learned, with the token that ends its turn; what users and tools say is not,
    also where a tool's result stands within the assistant's text (<result> … </result>, rollout.syntax).
    A row that cannot be used is told with its line and the reason; sft.skip lets a share be left out.

    The same recipe serves both commands: `sft` reads its sections sft, model, learn (not learn.lr), rollout,
    tools and task (how the model is asked), `train` all but sft. A run writes into runs/<name>-sft-s<seed>:
    metrics, curves, checkpoints, the model and summary.json, which says which epoch's model it is and why.
    Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at once. docs/sft.md tells more.
    """
    from actors.forking import GROWING, TRAINING, fork_server  # slow imports
    from system.doctor.supervised import require

    config, name = configured(args.words, args.resume, "espalier sft my.yaml sft.path=conversations.jsonl")
    for key in unsafe_on_resume(args.words) if args.resume else ():
        print(f"WARNING: {key} changes in the middle of a run: the checkpoint may not fit", file=sys.stderr)
    if args.show is not None:
        from system.observe.terminal import visible
        from system.sft.show import shown_examples

        for line in shown_examples(config, args.show):
            print(visible(line, breaks=True))
        return 0
    with fork_server(config, [*TRAINING, *(GROWING if config.sft.samples else ())]):  # it imports meanwhile
        require(config, args.resume)
        from actors.sft import sft  # Ray is imported when nothing stands against the run

        return sft(config, config_name=name, resume=args.resume)
