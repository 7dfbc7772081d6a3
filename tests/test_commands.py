"""Every command that README.md, CONTRIBUTING.md and docs/ show can be given: programs, targets, options,
recipes and settings are there.  (What a command then does, the tests of its part say.)
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.cli.command import split
from actors.cli.main import build_parser
from system.config import ConfigError, load

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/results/*.md")),
]

# What stands for something of the reader's, and what stands for it here; "" is nothing.
STANDS_FOR = {
    "my.yaml": "examples/my.yaml",
    "RECIPE": "examples/my.yaml",
    "N": "8",
    "environment=my_module:MyClass": "environment=walk:City",
    "key=value": "",
    "…": "",
    "$COMMON": "",
}
# Two commands in a line, as a table of commands has them.
SEVERAL = {"espalier status | cancel RUN": ["espalier status RUN", "espalier cancel RUN"]}
# Shown for what is said against them.
REFUSED = {"espalier train my.yaml num_generations=8": "did you mean rollout.leaves?"}
# Programs that are not ours.
OTHERS = {"cd", "cp", "source", "ssh", ".venv-verifiers/bin/python"}
MODULES_OF_OTHERS = {"pytest", "sglang.launch_server", "http.server"}

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_OURS = re.compile(r"(?:espalier|make|cd|python) ")
_INLINE = re.compile(r"`((?:espalier|make) [^`]+|python (?:-m [\w.]+|[\w./]+\.py)(?: [^`]*)?)`")
_INDENTED = re.compile(r"^    ((?:espalier|make) .*)", re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Commands that belong together: of a block, or of a piece of text."""
    rest = _BLOCK.sub("", text)
    for language, block in _BLOCK.findall(text):
        lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
        if language == "sh":
            yield [line for line in lines if line.strip()]
        elif not language:
            yield [line for line in lines if _OURS.match(line)]
    for found in (*_INLINE.findall(rest), *_INDENTED.findall(rest)):
        yield re.sub(r"\s*\n\s*", " ", found).split("; ")


def plain(line: str) -> list[str]:
    """The commands of a line, without what is said about them."""
    line = re.split(r"\s{2,}|\s+#|\s+>\s|\s+&$", line.strip())[0]
    line = re.sub(r"(?<=\s)\[([^\]]*)\](?=\s|$)", r"\1", line)  # what may be left out
    if line in SEVERAL:
        return SEVERAL[line]
    first, *more = line.split(" | ")
    return [first, *(f"espalier bench {words}" for words in more)]


def check(line: str, here: Path) -> None:
    """Raises AssertionError or ConfigError for a command, given in the directory ``here``, that is none."""
    program, *words = [STANDS_FOR.get(word, word) for word in shlex.split(line)]
    words = [word for word in words if word]
    if program == "espalier":
        check_espalier(words, here)
    elif program == "make":
        check_make(words)
    elif program == "python":
        check_python(words, here)
    else:
        assert program in OTHERS, f"{program}: what program is that?"


def check_espalier(words: list[str], here: Path) -> None:
    _, parsers = build_parser()
    assert words[0] in parsers, f"espalier {words[0]}: no such command"
    parser = parsers[words[0]]
    known = {name for action in parser._actions for name in action.option_strings}
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    # Exactly: argparse takes the beginning of an option, too.
    assert options <= known, f"espalier {words[0]} has no {options - known}"
    try:
        args = parser.parse_intermixed_args(words[1:])
    except SystemExit as stop:
        if len(words) == 1 or words[1].startswith("-"):  # a command by its name, or with one of its options
            return
        raise AssertionError(f"espalier {' '.join(words)}: not as its parser has it") from stop
    given = [word for word in getattr(args, "words", []) if not word.isdecimal()]
    if words[0] == "bench":
        return
    path, overrides = split(given)
    recipes = [*getattr(args, "recipes", []), *([args.config] if getattr(args, "config", None) else [])]
    run = path if words[0] == "eval" else getattr(args, "resume", None)  # or a model
    if path and not run:
        recipes.append(path)
    if run and str(run).startswith("runs/quickstart") and not recipes:
        recipes.append(ROOT / "configs" / "quickstart.yaml")
    for recipe in recipes:
        base = ROOT if str(recipe).startswith("examples/") else here
        found = sorted(base.glob(str(recipe))) if "*" in str(recipe) else [(base / recipe).resolve()]
        assert found, f"{recipe}: no such recipe"
        for one in found:
            load(one, overrides)
    if not recipes:
        load(None, overrides)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) \?=", makefile, re.MULTILINE))
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert given.keys() <= variables, f"the Makefile has no {given.keys() - variables}"
    asked = [word for word in words if "=" not in word and not word.startswith("-") and not word.isdecimal()]
    assert asked
    assert set(asked) <= targets, f"the Makefile has no {set(asked) - targets}"
    if asked == ["train"]:
        load(ROOT / given.get("CONFIG", "configs/quickstart.yaml"), shlex.split(given.get("ARGS", "")))


def check_python(words: list[str], here: Path) -> None:
    if words[0] != "-m":
        assert (here / words[0]).is_file(), f"{words[0]}: no such program"
    elif words[1] not in MODULES_OF_OTHERS:
        module = ROOT / words[1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words[1]


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one's own are looked for in the current directory."""
    monkeypatch.chdir(EXAMPLES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_commands_it_shows_can_be_given(document: Path) -> None:
    for together in commands(document.read_text(encoding="utf-8")):
        here = ROOT
        for line in [one for shown in together for one in plain(shown)]:
            if line in REFUSED:
                with pytest.raises(ConfigError, match=re.escape(REFUSED[line])):
                    check(line, here)
                continue
            try:
                check(line, here)
            except (AssertionError, ConfigError) as error:
                raise AssertionError(f"{line}: {error}") from error
            if line.startswith("cd "):
                here = (here / line.removeprefix("cd ")).resolve()
                assert here.is_dir(), line


def test_commands_are_found() -> None:
    found = [line for together in commands((ROOT / "README.md").read_text()) for line in together]
    assert len(found) > 40
    assert commands("```sh\nls\n```\n").__next__() == ["ls"]
    assert list(commands("see `make tset`, and\n\n    espalier trian x\n")) == [
        ["make tset"],
        ["espalier trian x"],
    ]
    assert plain("espalier bench host | judge     what it is") == [
        "espalier bench host",
        "espalier bench judge",
    ]
    assert plain("espalier plan my.yaml [--search]  # why") == ["espalier plan my.yaml --search"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("espalier trian my.yaml", "no such command"),
        ("espalier train my.yaml --resum runs/x", "no {'--resum'}"),
        ("espalier tree RUN --best --worst", "parser"),
        ("espalier bench nothing", "parser"),
        ("espalier train configs/none.yaml", "no such configuration file"),
        ("espalier train my.yaml flow.stalenes=1", "unknown key flow.stalenes"),
        ("espalier train my.yaml flow.staleness=-1", "must be 0 or more"),
        ("espalier study branching configs/none/*.yaml", "no such recipe"),
        ("espalier eval --endpoint URL --model NAME --config none.yaml", "no such configuration file"),
        ("make tset", "no {'tset'}"),
        ("make train SEDE=1", "no {'SEDE'}"),
        ("espalier eval runs/quickstart-s0 eval.questions=500", "more than task.eval_size"),
        ("make train ARGS='branching=nune'", "did you mean none?"),
        ("python examples/none.py", "no such program"),
        ("python -m system.none", "system.none"),
        ("rm -r runs", "what program"),
    ],
)
def test_a_command_that_is_none_is_told(line: str, says: str) -> None:
    with pytest.raises((AssertionError, ConfigError), match=re.escape(says)):
        check(line, ROOT)
