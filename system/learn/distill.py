"""On-policy distillation: the teacher's opinion of each token that the student sampled.

The student grows the trees; the teacher only says how likely their tokens are to it.  The gradient is that
of the reverse KL(π_θ‖π_T) of each next token, at the states the student came to (Agarwal et al., arXiv
2306.13649, with on-policy data and λ = 1): E_{x~π_θ}[(log π_θ(x) - log π_T(x)) ∇log π_θ(x)], estimated at the
one token that was sampled.  What a token does to the states after it is left out, as in practice it is
(discount 0): a token's term is then the same for all leaves below it, and a tree is exactly its paths.
"""

from __future__ import annotations

import torch

from system.learn.objective import LossTokens, exp_ratio


def reverse_kl(t: LossTokens, cap: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Its sum over the row's tokens, weighed by ``t.mult``, and sums for statistics.

    Its gradient is the one above; where the engine sampled from an older policy μ, with the importance weight
    π_θ/μ, at most ``cap``.  Tokens that the teacher has not scored (``t.teacher`` NaN) have no part in it.
    """
    assert t.teacher is not None
    now = t.logprob.detach()
    known = t.teacher.isfinite()
    gap = torch.where(known, now - t.teacher, 0)
    weight = t.mult * exp_ratio(now, t.behaviour).clamp(max=cap)
    kl = (weight * gap * (t.logprob - now).exp()).sum()
    return kl, {"teacher_kl": kl.detach(), "teacher_scored": (t.mult * known).sum()}
