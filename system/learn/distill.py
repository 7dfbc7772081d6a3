"""On-policy distillation: the teacher's opinion of each token that the student sampled.

The student grows the trees; the teacher only says how likely their tokens are to it.  The gradient is that
of the reverse KL(π_θ‖π_T) of each next token, at the states the student came to (Agarwal et al., arXiv
2306.13649, with on-policy data and λ = 1): E_{x~π_θ}[(log π_θ(x) - log π_T(x)) ∇log π_θ(x)], estimated at the
one token that was sampled.  What a token does to the states after it is left out, as in practice it is
(discount 0): a token's term is then the same for all leaves below it, and a tree is exactly its paths.
"""

from __future__ import annotations

import torch

from system.learn.divergence import exp_ratio


def reverse_kl(
    logprob: torch.Tensor, behaviour: torch.Tensor, teacher: torch.Tensor, cap: float
) -> torch.Tensor:
    """[M] float32 terms whose gradient is the one above, from [M] log-probabilities under the student (with
    gradient), under μ, the policy that sampled, and under the teacher.

    Where μ is an older policy they have the importance weight π_θ/μ, at most ``cap``.  They are 0 where the
    teacher has not scored the token (NaN).
    """
    now = logprob.detach()
    gap = torch.where(teacher.isfinite(), now - teacher, 0)
    return exp_ratio(now, behaviour).clamp(max=cap) * gap * (logprob - now).exp()
