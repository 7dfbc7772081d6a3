from __future__ import annotations

import dataclasses
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from system.config import (
    Config,
    ConfigError,
    at_step,
    from_dict,
    load,
    settings,
    to_dict,
    to_yaml,
    validate,
    without_effect,
)
from system.config.algorithms import ALGORITHMS
from system.config.check import part_problems
from system.config.explain import text
from system.config.hints import OTHER_NAMES

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_valid():
    validate(Config())
    assert load() == Config()


def test_layers_apply_in_order(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, "run: {seed: 1, steps: 10}\nlearn: {lr: 1e-4}\n", "root.yaml")
    write(tmp_path / "deep", "base: ../root.yaml\nrun: {steps: 20}\n", "middle.yaml")
    leaf = write(tmp_path / "deep", "base: middle.yaml\nflow: {staleness: 3}\n", "leaf.yaml")
    config = load(leaf, ["flow.staleness=0"])
    assert (config.run.seed, config.run.steps, config.learn.lr, config.flow.staleness) == (1, 20, 1e-4, 0)


def test_a_word_for_a_section_sets_its_name(tmp_path: Path):
    assert load(None, ["branching=none"]).branching.name == "none"
    config = load(write(tmp_path, "branching: random\ntask: reasoning-gym\n"))
    assert (config.branching.name, config.task.name) == ("random", "reasoning-gym")
    assert config.branching.alpha == Config().branching.alpha


def test_override_values_keep_their_types():
    config = load(
        None, ["tools.names=[search]", "task.options.level=3", "run.name=", "run.dir=a=b", "rollout.top_k=-1"]
    )
    assert config.tools.names == ["search"]
    assert config.task.options == {"level": 3}
    assert (config.run.name, config.run.dir) == ("", "a=b")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("flow.stalenes=1", "did you mean flow.staleness?"),
        ("rollout.staleness=1", "did you mean flow.staleness?"),
        ("staleness=1", "did you mean flow.staleness?"),
        ("rolout.leaves=4", "did you mean rollout?"),
        ("branching=arpo-paperr", "did you mean arpo-paper?"),
        ("run.seed=x", "run.seed='x' must be an integer: of everything"),
        ("rollout.temperature=hot", "rollout.temperature='hot' must be a number"),
        ("learn.learning_rate=1e-6", "unknown key learn.learning_rate; did you mean learn.lr?"),
        ("num_generations=8", "did you mean rollout.leaves?"),
        ("max_off_policy_steps=8", "did you mean flow.max_staleness?"),
        ("trainer.fully_async.max_staleness_steps=4", "did you mean flow.staleness?"),
        ("rollout.nothing=1", "unknown key rollout.nothing; known: schedule, leaves"),
        (
            "actor_rollout_ref.rollout.n=8",
            "unknown section 'actor_rollout_ref'; did you mean rollout.leaves?",
        ),
        ("algorithm.adv_estimator=grpo", "unknown section 'algorithm'; did you mean learn.credit?"),
        ("algorithm=grop", "did you mean grpo?"),
        ("tools.limits={serch: {retries: 0}}", "tools.limits.serch: no such tool"),
        ("tools.limits={search: {retry: 0}}", "did you mean retries?"),
        ("tools.limits={search: {retries: -1}}", "tools.limits.search.retries=-1 must be 0 or more"),
        ("tools.limits={search: {retries: 1.5}}", "tools.limits.search.retries=1.5"),
        ("tools.limits={search: {deadline_s: 0}}", "tools.limits.search.deadline_s=0 must be above 0"),
        ("run.seed.x=1", "run.seed"),
        (
            "task.columns=question:ask",
            "task.columns='question:ask' must be a dictionary: in a shell in quotes",
        ),
        ("run.seed=[", "not readable as YAML"),
        ("run.name=${nowhere}", r"run.name: Interpolation key 'nowhere' not found"),
        ("flow", "write key=value"),
        ("model=tiny", "model is a section"),
        ("rollout.roots=9", "between 1 and rollout.leaves=8"),
        ("rollout.leaves=7", "multiple of rollout.leaves=7"),
        ("rollout.schedule=lockstep", "it needs flow.staleness=0, not 1"),
        ("flow.staleness=-1", "flow.staleness=-1 must be 0 or more"),
        ("learn.updates=99", "exceeds the 8 trees"),
        ("rollout.temperature=0", "training needs samples"),
        ("rollout.top_p=0", r"(0, 1]"),
        ("learn.tp=3", "learn.tp=3 must divide model.heads=4"),
        ("learn.cp=0", "learn.cp=0 must be"),
        ("model.hidden_size=97", "multiple of model.heads"),
        ("learn.ep=3", "learn.ep=3 must be a multiple of learn.tp=1 and divide learn.tp"),
        ("learn.ep=4", "learn.dp=1: its ranks are some of those"),
        ("model.experts_per_token=9", "experts_per_token=9 is more than model.experts=8"),
        ("engine.max_context=256", "must exceed rollout.max_response_tokens=256"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_key(override: str, says: str):
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "object_type" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "expected sections"),
        ("a: [", "not readable as YAML"),
        ("run: {seed: 1, seed: 2}", "duplicate key"),
        ("base: recipe.yaml", "leads back to itself"),
        ("base: none.yaml", "no such configuration file"),
        ("base: [a, b]", "names one file"),
        ("flow: {batch: 3}", "unknown key flow.batch"),
        ("branching: null", "branching is a section"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, says: str):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path):
    """Of files and overrides: keys, types, ranges; whether keys agree is asked when nothing else is wrong."""
    recipe = write(tmp_path, "flow: {stalenes: 2, window: few}\nfoo: {bar: 1}\ntask: {eval_size: 10}\n")
    overrides = ["algorithm=none", "run.steps", "rollout.leaves=-1", "learn.epsilon=0.2", "eval.questions=11"]
    with pytest.raises(ConfigError) as caught:
        load(recipe, overrides)
    wanted = [
        "override 'run.steps': write key=value",
        "unknown key flow.stalenes; did you mean flow.staleness?",
        "flow.window='few' must be an integer",
        "unknown section 'foo'",
        "algorithm=none: choose one of",
        "unknown key learn.epsilon; did you mean learn.clip_low?",
        "rollout.leaves=-1 must be 1 or more",
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(wanted)
    assert all(says in line for says, line in zip(wanted, lines, strict=True)), lines


def test_more_questions_than_are_held_out_are_refused():
    with pytest.raises(ConfigError, match=r"eval\.questions=11 are more than task\.eval_size=10: raise task"):
        load(None, ["task.eval_size=10", "eval.questions=11"])


def test_a_hint_leads_to_a_key_that_there_is():
    assert OTHER_NAMES.keys() <= settings().keys()


def test_tensor_parallel_must_not_fit_a_model_of_ones_own():
    """The shape under ``model`` describes the model we make; a given one brings its own."""
    assert load(None, ["model.path=somewhere", "learn.tp=3"]).learn.tp == 3


def test_interpolation_reads_other_keys_and_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", "/data")
    config = load(None, ["task.path=${oc.env:DATA}/x.jsonl", "run.steps=7", "checkpoint.every=${run.steps}"])
    assert (config.task.path, config.checkpoint.every) == ("/data/x.jsonl", 7)


@pytest.mark.parametrize(
    "text", ["${x}", r"\${x}", r"a \\${x} b ${y}", "$5 {b}", "é ␛ 'q' \"d\"\n: #", "null", "1e3"]
)
def test_a_written_configuration_reads_back_equal(tmp_path: Path, text: str):
    config = Config()
    config.task.system_prompt = text
    config.task.options = {"text": text, "list": [text, 1, None, {"deep": True}]}
    assert load(write(tmp_path, to_yaml(config))) == config
    assert from_dict(to_dict(config)) == config


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.text(st.sampled_from("${}\\ab:'\" "), max_size=12))
def test_any_text_survives_a_round_trip(text: str):
    config = Config()
    config.task.system_prompt = text
    assert from_dict(to_dict(config)) == config


def test_from_dict_refuses_unknown_keys():
    with pytest.raises(ConfigError, match="nonsense"):
        from_dict({"run": {"nonsense": 1}})


def test_every_setting_says_what_it_is_and_every_number_has_a_bound():
    signed = {"branching.beta", "branching.tau", "learn.entropy_coef", "reward.weight"}
    for key, one in settings().items():
        assert one.rule.text, key
        if one.kind in (int, float):
            assert bool(one.rule.bounds) != (key in signed), key


def test_a_dictionary_is_merged_and_can_be_replaced(tmp_path: Path):
    write(
        tmp_path, "task: {options: {right: 0.4, slip: 0.5}}\nlearn: {credit: {options: {a: 1}}}", "base.yaml"
    )
    merged = write(tmp_path, "base: base.yaml\ntask: {options: {right: 0.1}}", "merged.yaml")
    assert load(merged).task.options == {"right": 0.1, "slip": 0.5}
    replaced = write(tmp_path, "base: base.yaml\ntask:\n  options: !replace {right: 0.1}\n", "replaced.yaml")
    assert load(replaced).task.options == {"right": 0.1}
    cleared = load(merged, ["task.options=!replace {}", "learn.credit.options=!replace {b: 2}"])
    assert (cleared.task.options, cleared.learn.credit.options) == ({}, {"b": 2})
    assert load(merged, ["task.options.new={x: 1}", "task.options.new=!replace {y: 2}"]).task.options[
        "new"
    ] == {"y": 2}


@pytest.mark.parametrize("key", ["run.seed", "branching", "learn.credit", "tools.names"])
def test_only_a_dictionary_can_be_replaced(key: str):
    with pytest.raises(ConfigError, match=f"{key} is no dictionary"):
        load(None, [f"{key}=!replace {{}}"])


def test_a_dictionary_inherited_as_an_interpolation_can_be_overridden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_TEXT", "text")
    for old in ("${oc.env:NOT_SET_ANYWHERE}", "${oc.env:SOME_TEXT}"):
        for new in ("{x: 1}", "!replace {x: 1}"):
            assert load(None, [f"task.options={old}", f"task.options={new}"]).task.options == {"x": 1}
    # The section that an interpolation points to stays as it is.
    shared = ("reward.options={a: {b: 1}}", "learn.credit.options=${reward.options}")
    assert load(None, [*shared, "learn.credit.options={a: !replace {c: 2}}"]).reward.options == {
        "a": {"b": 1}
    }


def test_the_mark_of_a_replacement_has_no_place_in_a_list() -> None:
    with pytest.raises(ConfigError, match=r"task\.options\.x is a list"):
        load(None, ["task.options={x: [!replace {a: 1}]}"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("learn.tis_cap=0", "learn.tis_cap=0.0 must be above 0"),
        ("learn.proximal=closed", "set rollout.rescore=true too"),
        (
            "rollout.score_answer=true engine.name=sglang rollout.temperature=0.8",
            "SGLang scores given tokens at temperature 1 only",
        ),
        ("learn.credit=igpo", "set rollout.score_answer=true too"),
        (
            "learn.credit=a2tgpo learn.objective=a2tgpo",
            "learn.credit=a2tgpo and learn.objective=a2tgpo: what",
        ),
        (
            "rollout.rescore=true engine.name=sglang engine.kv_after_update=keep",
            "rollout.rescore=true needs engine.kv_after_update=recompute",
        ),
        ("learn.dual_clip=0.5", "learn.dual_clip=0.5 must exceed 1 + learn.clip_high=1.2"),
        ("learn.clip_low=-1", "learn.clip_low=-1.0 must be in [0, 1]"),
        ("rollout.branch_deadline_s=.nan", "rollout.branch_deadline_s=nan must be a finite number"),
        ("tools.deadline_s=-3", "tools.deadline_s=-3.0 must be above 0"),
        ("run.stop_at_accuracy=90", "run.stop_at_accuracy=90.0 must be in [0, 1]"),
        ("rollout.temperature=.inf", "rollout.temperature=inf must be a finite number"),
        ("rollout.temperature=1e-9", "rollout.temperature=1e-09 must be in [0.01, 100]"),
        ("learn.beta2=1", "learn.beta2=1 must be below 1"),
        ("rollout.leaves=1 rollout.roots=1", "nothing to compare a leaf with"),
        ("model.path=~/model", "model.path=~/model: `~` stands for nothing here"),
        ("tools.corpus=~me/corpus.jsonl", "`~` stands for nothing here: write the whole path"),
        (r'run.dir="a\0b"', "has a NUL character in it"),
        ("tools.names=python", "tools.names: write a list: [python]"),
        ("tools.names={}", "tools.names: write a list"),
        ("engine.urls=[[[]]]", "engine.urls: [[]] must be a text"),
        (
            "engine=sglang engine.urls=[http://a:1,http://b:1,http://a:1/]",
            "engine.urls names http://a:1 more than once",
        ),
        ("branching.alpha=50", "branching.alpha=50.0 must be in [0, 1]"),
        ("warmstart.demos=0", "warmstart.demos=0 must be 1 or more"),
        ("learn.teacher=average flow.skip_silent=64", "leaves it out: set flow.skip_silent=0"),
    ],
)
def test_settings_that_make_training_void_or_nonsense_are_refused(words: str, says: str):
    with pytest.raises(ConfigError) as caught:
        load(None, words.split())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_credit_over_the_batch_may_have_trees_of_one_leaf():
    assert load(None, ["rollout.leaves=1", "rollout.roots=1", "learn.credit=reinforce++"]).rollout.leaves == 1


def test_all_broken_rules_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load(None, ["learn.tis_cap=0", "run.stop_at_accuracy=90", "model.path=~/x"])
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "run.stop_at_accuracy",
        "model.path",
        "learn.tis_cap",
    ]


ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["~", "${run.seed}", "${", "!replace", "cuda", "a:b", "none", "grpo", "auto", "http://"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def any_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Values of some settings: of any type, or of the setting's own."""
    chosen: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(sorted(settings())), min_size=1, max_size=3, unique=True)):
        one = settings()[key]
        words = [*one.rule.choices, *(one.rule.registry.names if one.rule.registry else ()), "a:b", "~", ""]
        own = {int: st.integers(-2, 300), float: st.floats(-1, 3), bool: st.booleans()}
        chosen[key] = draw(own.get(one.kind, st.sampled_from(words)) | ANY_VALUE)
    return chosen


@hypothesis_settings(max_examples=500, deadline=None)
@given(values=any_settings(), in_file=st.booleans())
def test_any_values_make_a_configuration_or_a_clear_error(
    values: dict[str, Any], in_file: bool, tmp_path_factory: pytest.TempPathFactory
):
    """500 random configurations, in a file or as overrides: nothing is raised but ConfigError."""
    layer: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        reduce(lambda inner, section: inner.setdefault(section, {}), sections, layer)[name] = value
    try:
        if in_file:
            config = load(write(tmp_path_factory.getbasetemp(), yaml.safe_dump(layer)))
        else:
            config = load(None, [f"{key}={value}" for key, value in values.items()])
        part_problems(config)
    except ConfigError as error:
        text = str(error)
    else:
        validate(config)
        return
    assert text.strip()
    assert "object_type" not in text


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_by_name_comes_before_other_settings(name: str, tmp_path: Path) -> None:
    config = load(QUICKSTART, ["learn.clip_low=0.11", f"algorithm={name}"])
    assert config.learn.clip_low == 0.11
    set_by_it = dict(text.split("=") for text in ALGORITHMS[name])
    assert config.learn.credit.name == set_by_it["learn.credit"]
    assert config.learn.objective.name == set_by_it["learn.objective"]
    assert part_problems(config) == []
    (tmp_path / "mine.yaml").write_text(f"base: {QUICKSTART}\nalgorithm: {name}\nbranching: none\n")
    mine = load(tmp_path / "mine.yaml")
    assert mine.learn == dataclasses.replace(config.learn, clip_low=mine.learn.clip_low)
    assert mine.branching.name == "none"
    assert f"algorithm={name}\n    {' '.join(ALGORITHMS[name])}\n" in text("algorithm")


def test_an_unknown_algorithm_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'algorithm=x': algorithm=x: choose one of grpo, dr-grpo"):
        load(QUICKSTART, ["algorithm=x"])


def test_settings_change_by_the_step() -> None:
    course = "run.by_step={learn.clip_high: [[10, 0.2], [20, 0.4]], rollout.temperature: [[0, 1], [4, 0.6]]}"
    config = load(QUICKSTART, [course])
    highs = [at_step(config, step).learn.clip_high for step in (0, 10, 15, 20, 99)]
    assert highs == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.4])
    assert at_step(config, 1).rollout.temperature == pytest.approx(0.9)
    plain = load(QUICKSTART, [])
    assert dataclasses.replace(at_step(config, 7), run=plain.run, rollout=plain.rollout) == plain


@pytest.mark.parametrize(
    ("course", "said"),
    [
        ("{learn.lr: [[0, 1]]}", "run.by_step.learn.lr: only rollout.temperature, learn.clip_low"),
        ("{learn.clip_low: 0.2}", "must be pairs of a step and a value"),
        ("{learn.clip_low: [[0, high]]}", "must be pairs of a step and a value"),
        ("{learn.clip_low: []}", "must be pairs of a step and a value"),
        ("{learn.clip_low: [[4, 0.1], [4, 0.2]]}", "the steps must rise"),
        ("{rollout.temperature: [[0, 1], [9, 0]]}", "step 9: rollout.temperature=0 must be in [0.01, 100]"),
        ("{learn.clip_high: [[0, 0.2], [9, 3]]}", "step 9: learn.dual_clip=3.0 must exceed"),
    ],
)
def test_a_course_that_cannot_be_is_refused(course: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(QUICKSTART, [f"run.by_step={course}"])


def test_a_course_of_the_temperature_that_sglang_could_not_score_at_is_refused() -> None:
    course = "run.by_step={rollout.temperature: [[0, 1], [9, 0.8]]}"
    load(QUICKSTART, [course, "rollout.rescore=true"])
    with pytest.raises(ConfigError, match="SGLang scores given tokens at temperature 1 only"):
        load(QUICKSTART, [course, "rollout.rescore=true", "engine.name=sglang"])


def test_a_course_that_an_option_of_the_objective_goes_before_is_refused() -> None:
    course = "run.by_step={learn.clip_high: [[0, 0.2], [9, 0.3]]}"
    said = (
        "run.by_step.learn.clip_high would change nothing: learn.objective.options.clip_high goes before it"
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(QUICKSTART, [course, "learn.objective.options={clip_high: 0.4}"])
    load(QUICKSTART, [course, "learn.objective.options={clip_low: 0.1}"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("tools.names=[search,python,search]", "tools.names: 'search' stands there twice"),
        ("reward=collections:OrderedDict", "OrderedDict has no method score()"),
    ],
)
def test_parts_that_cannot_do_their_work_are_refused(words: str, says: str) -> None:
    assert any(says in problem for problem in part_problems(load(QUICKSTART, [words])))


def test_a_section_within_a_section(tmp_path: Path) -> None:
    """``learn.lora``: by a file, by overrides, in the reference; and its rules."""
    file = write(tmp_path, "model: {path: m}\nlearn:\n  lr: 0.1\n  lora: {rank: 8, targets: [q, v]}\n")
    config = load(file, ["learn.lora.alpha=4"])
    lora = config.learn.lora
    assert (lora.rank, lora.alpha, lora.parts(experts=False), config.learn.lr) == (8, 4.0, ("q", "v"), 0.1)
    assert from_dict(to_dict(config)) == config
    assert load(write(tmp_path, to_yaml(config))) == config
    assert "learn.lora.rank\n    integer, default 0; 0 or more" in text("learn.lora")
    apart = ["engine=sglang", "learn.lora.sync=adapter"]
    load(file, [*apart, "engine.sglang={max_loras_per_batch: 4}"])
    for words, says in (
        (["learn.lora=8"], "learn.lora is a section; set one of its keys, e.g. learn.lora.rank"),
        (["learn.lora.rnk=8"], "unknown key learn.lora.rnk; did you mean learn.lora.rank?"),
        (["learn.lora.rank=-1"], "learn.lora.rank=-1 must be 0 or more"),
        (["learn.lora.rank=x"], "learn.lora.rank='x' must be an integer"),
        (["learn.lora.targets=[q, lm_head]"], "learn.lora.targets: 'lm_head': choose of q, k, v, o"),
        (
            ["learn.lora.rank=0", "learn.lora.init=x"],
            "learn.lora.init=x does nothing while learn.lora.rank=0",
        ),
        (["learn.proximal=average"], "learn.proximal=average: no moving average of adapters"),
        (["engine=sglang", "engine.sglang={enable_lora: true}"], "enable_lora: SGLang gets merged weights"),
        ([*apart, "engine.sglang={max-lora-rank: 9}"], "engine.sglang.max-lora-rank is set by learn.lora"),
        ([*apart, "engine.weights=disk"], "engine.weights=disk is a way for all weights"),
        (["model.path="], "without model.path they would be random ones"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(file, words)
        assert says in str(caught.value), words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["learn.teacher_decay=0.9"], ["learn.teacher_decay=0.9 will do nothing"]),
        (["learn.teacher_decay=0.9", "learn.teacher=average"], []),
        (
            ["learn.lora={rank: 0, alpha: 4, targets: [q], sync: adapter}"],
            [f"learn.lora.{name} will do nothing" for name in ("alpha=4.0", "targets=['q']", "sync=adapter")],
        ),
        (["learn.lora.targets=[q, k, v, o, gate, up, down]"], []),  # as older runs have it
        (["learn.teacher_coef=0.5"], ["learn.teacher_coef=0.5 will do nothing: learn.teacher=none"]),
        (["cluster.ray_agents=true"], []),
        (["cluster.ray_agents=true", "cluster.address=a:1"], ["cluster.ray_agents=true will do nothing"]),
        (["engine=sglang", "engine.sglang={mem_fraction_static: 0.8}"], []),
        (
            ["engine=sglang", "engine.sglang={mem_fraction_static: 0.8}", "engine.urls=[http://a]"],
            ["engine.sglang (mem_fraction_static) will do nothing"],
        ),
    ],
)
def test_settings_that_do_nothing_beside_others_are_known(words: list[str], says: list[str]) -> None:
    told = list(without_effect(load(None, words)))
    assert len(told) == len(says)
    assert all(line.startswith(said) for line, said in zip(told, says, strict=True))
