"""The section ``learn`` of the configuration (:mod:`system.config.schema` has the others)."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from dataclasses import dataclass, field

from system.config.rule import PartConfig, setting
from system.config.schema_lora import LoraConfig
from system.plugins import AGGREGATES, CORRECTIONS, CREDITS, OBJECTIVES


@dataclass
class LearnConfig:
    """The learner: its parallel layout, credit, objective and optimizer."""

    tp: int = setting(1, "tensor parallel: ranks that share every layer", least=1)
    pp: int = setting(1, "pipeline parallel: stages that hold consecutive layers", least=1)
    cp: int = setting(1, "context parallel: ranks that a micro-batch's tokens are spread over", least=1)
    dp: int = setting(1, "data parallel: model copies, each with its share of the micro-batches", least=1)
    ep: int = setting(
        1,
        "expert parallel: ranks, of those of tp, cp and dp, that share the experts of a mixture; 1: each "
        "expert is split over the TP ranks",
        least=1,
    )
    sequence_parallel: bool = setting(False, "split activations between attention and MLP over TP ranks too")
    distributed_optimizer: bool = setting(False, "split the optimizer state over the CP and DP ranks")
    offload: bool = setting(
        False,
        "keep the optimizer state in the host's memory, split over the CP and DP ranks, and step on the CPU "
        "with learn.threads threads per rank: 12 bytes per parameter less on the GPUs",
    )
    recompute: str = setting(
        "none",
        "in the backward pass: selective (norms, MLP and experts), full (every layer)",
        choices=("none", "selective", "full"),
    )
    attention: str = setting(
        "auto",
        "kernels on GPU: flex (FlexAttention), flash (FlashAttention 4), auto (flash where it serves)",
        choices=("auto", "flex", "flash"),
        safe_on_resume=True,
    )
    threads: int = setting(1, "CPU threads of one rank", least=1, safe_on_resume=True)
    credit: PartConfig = setting(PartConfig("arpo-soft"), "from rewards to advantages", registry=CREDITS)
    objective: PartConfig = setting(PartConfig("decoupled"), "the loss", registry=OBJECTIVES)
    aggregate: PartConfig = setting(
        PartConfig("token-mean"), "how the losses of leaves add up to one number", registry=AGGREGATES
    )
    correction: PartConfig = setting(
        PartConfig("none"),
        "a weight for each leaf by how far off-policy its path is; all but none cost a forward pass",
        registry=CORRECTIONS,
    )
    proximal: str = setting(
        "start",
        "what decoupled clips against: start: the policy at the start of the batch; average: a moving "
        "average of the weights (PPO-EWMA), for which every batch takes one more forward pass; closed: the "
        "policy that the engine held when the token's turn ended (rollout.rescore)",
        choices=("start", "average", "closed"),
    )
    proximal_reset: float = setting(
        0.9,
        "share of tokens within the clip, below which the average begins again; 0: never",
        least=0,
        most=1,
    )
    updates: int = setting(1, "optimizer steps per training batch", least=1)
    micro_tokens: int = setting(4096, "packed tokens per forward pass, over all learn.cp ranks", least=1)
    lr: float = setting(1e-3, "learning rate (Adam)", above=0)
    warmup_steps: int = setting(0, "steps over which the learning rate rises from 0", least=0)
    lr_decay: str = setting(
        "constant",
        "the learning rate's course after that, until run.steps",
        choices=("constant", "linear", "cosine"),
    )
    lr_end: float = setting(0.1, "where it ends, as a share of learn.lr", least=0, most=1)
    weight_decay: float = setting(0.01, "decoupled from the gradient (AdamW)", least=0)
    beta1: float = setting(0.9, "Adam's decay of the gradient's mean", least=0, most=1)
    beta2: float = setting(0.95, "Adam's decay of its square", least=0, most=1)
    eps: float = setting(1e-8, "Adam's ε", above=0)
    grad_clip: float = setting(1.0, "the gradient's norm is cut to this; 0: off", least=0)
    clip_low: float = setting(0.2, "ε below: the ratio is clipped at 1 - ε", least=0, most=1)
    clip_high: float = setting(0.2, "ε above: the ratio is clipped at 1 + ε", least=0)
    dual_clip: float = setting(3.0, "bound on the ratio where the advantage is negative; 0: off", least=0)
    tis_cap: float = setting(2.0, "cap of proximal/behaviour ratio (truncated importance sampling)", above=0)
    kl_coef: float = setting(0.0, "KL to the reference model; 0: no reference model is built", least=0)
    entropy_coef: float = setting(0.0, "entropy bonus")
    entropy_factor: float = setting(
        0.0,
        "a token's advantages times 1 + this·z(the entropy it was sampled with) (AEPO's code: 0.2); 0: off",
        least=0,
    )
    teacher: str = setting(
        "none",
        "on-policy distillation: who says of sampled tokens how likely they should have been: server (the "
        "model at teacher.urls), average (of the weights that are trained), none",
        choices=("none", "server", "average"),
    )
    teacher_coef: float = setting(
        1.0,
        "weight of the reverse KL to the teacher beside the objective's loss; learn.credit=none leaves the "
        "rewards out",
        above=0,
    )
    teacher_decay: float = setting(0.99, "of the average that teaches, per optimizer step", least=0, most=1)
    aux_loss: float = setting(
        0.0, "of a mixture of experts: weight of the loss that balances their load; 0: off", least=0
    )
    bucket_mb: int = setting(64, "weight export bucket", least=1)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def ranks(self) -> int:
        """Processes, and GPUs, of the learner."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights, but for experts."""
        return self.cp * self.dp

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts."""
        return self.copies * self.tp // self.ep if self.ep > 1 else self.copies

    @property
    def expert_tp(self) -> int:
        """Ranks that each expert is split over."""
        return self.tp if self.ep == 1 else 1
