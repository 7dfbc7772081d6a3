"""The rules of the house that no linter knows: ``python tests/house.py`` prints what breaks them.

``make check`` runs it beside import-linter (who may import whom) and pyright.  Dead code is what vulture
finds unused by ``system``, ``actors`` and ``examples``: what only a test calls is dead, too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from vulture import Vulture

PACKAGES = ("system", "actors")
FOREIGN = "in_server"  # runs inside SGLang's process, with SGLang's names
MOST_LINES = 450
# Who may import a module whose name is not written there.
DYNAMIC = {
    "system/plugins.py": "a user's own part, by the name in the configuration",
    "system/tools/sandbox/forkserver.py": "modules that the sandboxed programs find loaded already",
}

# What vulture takes for dead, and who uses it: the names of methods, attributes, parameters and fields.
ALIVE = {
    "asyncio calls a loop's methods, and reads it": "executor _clock_resolution",
    "pickle asks for it": "reducer_override",
    "rich calls it when the pipe is closed": "on_broken_pipe",
    "rich reads it": "min_width",
    "Ray reads it": "ENABLE_RAY_CLUSTER",
    "mpmath reads it": "dps",
    "numpy reads it": "writeable",
    "gymnasium draws from it": "np_random",
    "the MCP SDK calls it": "validate_tool_result",
    "Python reads it": "dont_write_bytecode __stdout__ __stderr__",
    "tokenizers read it": "pre_tokenizer",
    "transformers calls a callback's methods": "on_step_end",
    "transformers reads it from its tokenizers": "response_template",
    "torch's checkpoint calls a planner's methods": "create_local_plan create_global_plan lookup_object "
    "lookup_tensor",
    "Megatron passes it to an attention module": "attn_mask_type attention_type "
    "attention_dropout attention_mask packed_seq_params",
    "Megatron reads it from its modules": "core_attention input_layernorm pre_mlp_layernorm "
    "q_layernorm k_layernorm router_replay",
    "Megatron's router calls it": "get_replay_topk",
    "counted for /v1/loads, whole": "moment_rr moment_rp moment_pp moment_rt moment_pt "
    "requests recomputed_sequences idle_updating_s",
    "the python server replies with its result, whole": "peak_rss_mb",
    "what a test does to a simulated run, or sees of it": "set_down retracted",
    "fake tensors read it": "cache_enabled",
    "a figure of a report, read by name": "trees_per_hour accuracy_low accuracy_high unread",
}


def broken_rules(root: Path) -> list[str]:
    """One line for each thing under ``root`` (a checkout) that is not as it should be."""
    found: list[str] = []
    classes: dict[str, list[str]] = defaultdict(list)
    for path in files(root):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MOST_LINES:
            found.append(f"{name}: {lines} lines; at most {MOST_LINES}: split it by what changes together")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(f"{name}:{node.lineno}")
        if name.startswith("system/"):
            found += [f"{name}:{line}: {what}" for line, what in hidden_imports(tree, name in DYNAMIC)]
    for path in sorted(path for kind in ("js", "css") for path in (root / "system").rglob(f"*.{kind}")):
        if (lines := path.read_text(encoding="utf-8").count("\n")) > MOST_LINES:
            found.append(
                f"{path.relative_to(root).as_posix()}: {lines} lines; at most {MOST_LINES}: split it"
            )
    for word, places in sorted(classes.items()):
        if len(places) > 1:
            found.append(f"class {word} stands in {' and in '.join(places)}: one name, one thing")
    return found + dead_code(root)


def dead_code(root: Path) -> list[str]:
    """What nothing in the packages uses, and entries of ``ALIVE`` that are no longer needed."""
    vulture = Vulture()
    users = root / "examples"  # what they use is there for users
    vulture.scavenge([*(root / package for package in PACKAGES), users], exclude=[f"*/{FOREIGN}/*"])
    unused = vulture.get_unused_code()
    alive = {name for names in ALIVE.values() for name in names.split()}
    texts = [path.read_text(encoding="utf-8") for path in files(root)]
    parts = {name for text in texts for name in re.findall(r'"[\w.]+:(\w+)"', text)}  # of a registry's table
    found: list[str] = []
    for item in unused:
        if item.name not in alive | parts and users not in Path(item.filename).parents:
            name = Path(item.filename).relative_to(root).as_posix()
            found.append(f"{name}:{item.first_lineno}: unused {item.typ} {item.name}")
    found += [f"ALIVE in house.py: {name} is used" for name in sorted(alive - {item.name for item in unused})]
    return found


def files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if FOREIGN not in path.parts:
                yield path


def hidden_imports(tree: ast.Module, dynamic: bool) -> Iterator[tuple[int, str]]:
    """Imports that import-linter cannot see: (line, what is wrong).  ``dynamic``: names need not be written
    there."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called not in ("import_module", "__import__"):
            continue
        module = node.args[0] if node.args else None
        if isinstance(module, ast.Constant) and isinstance(module.value, str):
            if module.value.split(".")[0] in ("actors", "ray"):
                yield node.lineno, f"imports {module.value}: system never imports actors or ray"
        elif not dynamic:
            yield node.lineno, "imports a module whose name is not written there (see DYNAMIC in house.py)"


if __name__ == "__main__":
    broken = broken_rules(Path(__file__).resolve().parent.parent)
    print("\n".join(broken) or "The house is in order.")
    sys.exit(bool(broken))
