# ruff: noqa: E501  (a table)
"""Plant mistakes in the formulas of credits, objectives, packing and guidance, one at a time, and say which test
finds each.

    python tests/learn/plant_mutations.py [WORD]

``WORD``: only those whose description it is in.  Runs on a copy; the exit status is the number of mistakes that
no test found.  Some ten seconds each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEARN = (
    *(
        "learn/test_algorithms.py",
        "learn/test_credit.py",
        "learn/test_gain.py",
        "learn/test_learner_objective.py",
    ),
    "learn/test_tree_is_its_paths.py",
)
GROWTH = (
    *("rollout/test_rescore.py", "rollout/test_answer_scores.py", "rollout/test_guided.py"),
    "rollout/test_expert.py",
)
# Which tests under tests/ are asked, by the folder under system/ that the mistake is in.
TESTS = {
    "learn": LEARN,
    "tree": (*LEARN, *GROWTH),
    "rollout": GROWTH,
    "flow": ("flow/test_guidance.py",),
}

# what is wrong, file under system/, the right text, the wrong one
MISTAKES = [
    ("sign: the worst leaf is pushed", "learn/credit/group.py", "r - r.mean()", "r.mean() - r"),
    ("RLOO without its weight G/(G-1)", "learn/credit/group.py", "(r.size / max(r.size - 1, 1))", "1.0"),
    ("GRPO with the std of the whole (1/G)", "learn/credit/group.py", "r.std(ddof=1)", "r.std()"),
    ("a turn off: TreeRL against the node itself", "learn/credit/node.py", "value[fork_above(tree)]) /", "value) /"),
    ("TreeRL without 1/√n", "learn/credit/node.py", " / np.sqrt(tree.scored_below)", ""),
    ("AT²PO weighs by -H", "learn/credit/node.py", "np.exp(h - h.max())", "np.exp(h.min() - h)"),
    ("a turn off: GiGPO counts the step itself as following", "learn/credit/step.py", "[:, ::-1] - step", "[:, ::-1]"),
    ("Tree-GRPO without the part of the root branch", "learn/credit/tree.py", "a[inside] += ", "a[inside] += 0 * "),
    ("sign: A²TGPO rewards what makes the answer less likely", "learn/credit/gain.py", "p - before", "before - p"),
    ("a turn off: A²TGPO begins with the next turn's gain", "learn/credit/gain.py", "np.array(ahead[::-1])[turn[nodes]]", "np.array([*ahead[::-1], 0.0])[turn[nodes] + 1]"),
    ("A²TGPO without 1/√n", "learn/credit/gain.py", " / np.sqrt(np.maximum(left, 1))", ""),
    ("A²TGPO without its weight α", "learn/credit/gain.py", "self.alpha * sums", "sums"),
    ("A²TGPO compares a turn with later ones, too", "learn/credit/gain.py", "turn == k", "turn >= k"),
    ("sign: A²TGPO narrows the clip of a turn that gained", "learn/credit/gain.py", "beta * np.tanh", "-beta * np.tanh"),
    ("a turn off: A²TGPO scales the clip behind the result", "learn/credit/gain.py", "scale[tree.parent[result]] +=", "scale[result + 1] +="),
    ("A²TGPO scales the clip on one side only", "learn/gates.py", "1 - c * self.eps_low", "1 - 0 * c - self.eps_low"),
    ("IGPO without the reward behind the last turn", "learn/credit/gain.py", "ends[tree.scored] = pooled", "ends[tree.scored] = 0 * pooled"),
    ("A²TGPO and IGPO without γ", "learn/credit/gain.py", "value + self.gamma * ahead[-1]", "value + ahead[-1]"),
    ("sign: what the answer gained is its logarithm's fall", "learn/credit/gain.py", "np.exp(tree.answer)", "np.exp(-tree.answer)"),
    ("EMA-GRPO uses the averages before their update", "learn/credit/ema.py", "(self.decay * a + (1 - self.decay) * b", "(a + 0 * b"),
    ("clip: the bounds are swapped", "learn/objective.py", "s_plus * ratio.clamp(max=1 + high)", "s_plus * ratio.clamp(max=1 + low)"),
    ("no dual clip", "learn/objective.py", "dual if dual > 0 else None", "None"),
    ("CISPO whose weight carries a gradient", "learn/gates.py", "ratio.detach().clamp(self.low", "ratio.clamp(self.low"),
    ("SAPO's temperatures are swapped", "learn/gates.py", "for tau in self.taus)", "for tau in self.taus[::-1])"),
    ("DPPO keeps the wrong side", "learn/gates.py", "p - q >= -self.delta", "q - p >= -self.delta"),
    ("a turn's ratio is a sum, no mean", "learn/gates.py", "(total / count.clamp(min=1))[unit]", "total[unit]"),
    ("sign: the weight of decoupled is μ/π_prox", "learn/objective.py", "full = exp_ratio(proximal, t.behaviour)", "full = exp_ratio(t.behaviour, proximal)"),
    ("μ stands for what the engine found at the close", "learn/rows.py", "self.batch.closed[self.scored]", "self.batch.logprob[self.scored]"),
    ("a token off: scores at the close", "rollout/request.py", "rescore(node, found.logprob,", "rescore(node, np.roll(found.logprob, 1),"),
    ("what was not scored at the close counts as certain", "tree/pack.py", "np.where(np.isnan(closed), batch.logprob[rows], closed)", "np.nan_to_num(closed)"),
    ("a token off: the gold answer's scores begin with its opening", "rollout/request.py", "before.size + first,", "before.size + first - 1,"),
    ("a turn off: one action fewer is told than was drawn", "rollout/context.py", "prompt.actions[:guide]", "prompt.actions[: guide - 1]"),
    ("a turn off: the search for the fewest actions rounds down", "flow/guidance.py", "(self.works or self.most) + 1) // 2", "(self.works or self.most)) // 2"),
    ("sign: questions that are not hopeless are guided", "flow/guidance.py", "pool == Pool.HOPELESS", "pool != Pool.HOPELESS"),
    ("a guided tree that earned nothing counts as a success", "flow/guidance.py", "rate > 0", "rate >= 0"),
    ("a guided tree is trained under the guide", "tree/builder.py", "unsampled(name, self._trained, array)", "unsampled(name, self._sampled[-self._trained.size :] if self.guide else self._trained, array)"),
    ("the engine is blamed for the guide", "learn/objective.py", "fresh * (1 - t.guided)", "fresh * t.guided"),
    ("sign: an expert's turns learn from those who did badly", "tree/plan.py", "credit[expert, 1], credit[expert, 2] = 0,", "credit[expert, 0], credit[expert, 2] = 0,"),
    ("an expert's turns weigh by all leaves below", "tree/plan.py", "_praised(tree, a, w, total, per, hard)[expert]", "total[expert]"),
    ("sign: an expert's turns on flattened paths", "tree/plan.py", "(tree.kind[nodes] == Kind.EXPERT) & (a > 0)", "(tree.kind[nodes] == Kind.EXPERT) & (a < 0)"),
    ("an expert's tokens have a ratio", "learn/rows.py", "torch.where(sampled > 0, behaviour, own.to(behaviour))", "torch.where(sampled > 0, behaviour, 0 * own.to(behaviour))"),
    ("an expert's tokens weigh in a correction", "learn/rows.py", "torch.where(sampled.isnan(), 0.0,", "torch.where(sampled.isnan(), 1.0,"),
    ("a turn off: branches go on a turn before the one that was drawn", "rollout/expert.py", "found[count] for count", "found[count - 1] for count"),
    ("an expert's calls do not count", "rollout/expert.py", "prefix.tools, len(prefix.tools)", "prefix.tools, 0"),
    ("a shared token counts once per tree, not per leaf", "tree/plan.py", "w * np.minimum(a, 0), w]", "w * np.minimum(a, 0), w * 0 + 1]"),
    ("S⁻ holds the positive part", "tree/plan.py", "w * np.minimum(a, 0)", "w * np.maximum(a, 0)"),
]  # fmt: skip


def main() -> int:
    chosen = [one for one in MISTAKES if all(word in one[0] for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("system", "tests", "configs", "examples", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        asked = {test: None for _, file, *_ in chosen for test in TESTS[file.split("/")[0]]}
        if found := _failing(copy, asked):
            print(f"without a mistake {found} fails already", file=sys.stderr)
            return 1
        missed = 0
        for what, file, right, wrong in chosen:
            path = copy / "system" / file
            text = path.read_text()
            if right not in text:
                print(f"{file} does not hold {right!r} any more", file=sys.stderr)
                return 1
            path.write_text(text.replace(right, wrong, 1))
            found = _failing(copy, TESTS[file.split("/")[0]])
            path.write_text(text)
            missed += not found
            print(f"| {what} | `{file}` | {f'`{found}`' if found else '**nothing**'} |", flush=True)
    return missed


def _failing(root: Path, tests: Iterable[str]) -> str:
    """The first of ``tests`` that fails in the tree at ``root``; empty: none."""
    options = ("-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in tests)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode == 0:
        return ""
    named = re.search(r"(?:FAILED|ERROR) tests/\w+/(\S+)", done.stdout)
    return named[1] if named else f"pytest itself, {done.stdout[-200:]}{done.stderr[-200:]}"


if __name__ == "__main__":
    sys.exit(main())
