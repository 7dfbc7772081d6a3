# ruff: noqa: E501  (a table)
"""Plant mistakes in the formulas of credits, objectives and packing, one at a time, and say which test finds each.

    python tests/learn/plant_mutations.py

Runs on a copy; the exit status is the number of mistakes that no test found.  Some ten seconds each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = [
    "test_algorithms.py",
    "test_credit.py",
    "test_gain.py",
    "test_learner_objective.py",
    "test_tree_is_its_paths.py",
]

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
    ("EMA-GRPO uses the averages before their update", "learn/credit/ema.py", "(self.decay * a + (1 - self.decay) * b", "(a + 0 * b"),
    ("clip: the bounds are swapped", "learn/objective.py", "s_plus * ratio.clamp(max=1 + high)", "s_plus * ratio.clamp(max=1 + low)"),
    ("no dual clip", "learn/objective.py", "dual if dual > 0 else None", "None"),
    ("CISPO whose weight carries a gradient", "learn/gates.py", "ratio.detach().clamp(self.low", "ratio.clamp(self.low"),
    ("SAPO's temperatures are swapped", "learn/gates.py", "for tau in self.taus)", "for tau in self.taus[::-1])"),
    ("DPPO keeps the wrong side", "learn/gates.py", "p - q >= -self.delta", "q - p >= -self.delta"),
    ("a turn's ratio is a sum, no mean", "learn/gates.py", "(total / count.clamp(min=1))[unit]", "total[unit]"),
    ("a shared token counts once per tree, not per leaf", "tree/plan.py", "w * np.minimum(a, 0), w]", "w * np.minimum(a, 0), w * 0 + 1]"),
    ("S⁻ holds the positive part", "tree/plan.py", "w * np.minimum(a, 0)", "w * np.maximum(a, 0)"),
]  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("system", "tests", "configs", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        if found := _failing(copy):
            print(f"without a mistake {found} fails already", file=sys.stderr)
            return 1
        missed = 0
        for what, file, right, wrong in MISTAKES:
            path = copy / "system" / file
            text = path.read_text()
            if right not in text:
                print(f"{file} does not hold {right!r} any more", file=sys.stderr)
                return 1
            path.write_text(text.replace(right, wrong, 1))
            found = _failing(copy)
            path.write_text(text)
            missed += not found
            print(f"| {what} | `{file}` | {f'`{found}`' if found else '**nothing**'} |", flush=True)
    return missed


def _failing(root: Path) -> str:
    """The first test that fails in the tree at ``root``; empty: none."""
    tests = [f"tests/learn/{name}" for name in TESTS]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *tests,
        ],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode == 0:
        return ""
    named = re.search(r"FAILED tests/learn/(\S+)", done.stdout)
    return named[1] if named else f"pytest itself, {done.stdout[-200:]}{done.stderr[-200:]}"


if __name__ == "__main__":
    sys.exit(main())
