"""The quickstart's world, questions, tokenizer and expert."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from system.config import Config
from system.tasks.quickstart import questions, vocabulary
from system.tasks.quickstart.task import QuickstartTask
from system.tasks.quickstart.world import FIGURE_RANGE, LINKS, NAMES, NUMBERS, TYPES, generate
from system.tasks.skill import Skill
from system.tools.search_index import Document, SearchIndex


def make(seed: int) -> QuickstartTask:
    config = Config()
    config.run.seed, config.tools.search_top_k = seed, 2
    config.task.train_size, config.task.eval_size = 1500, 200
    return QuickstartTask(config)


@pytest.fixture(scope="module")
def task() -> QuickstartTask:
    return make(seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.build()


def question(prompt) -> str:
    return prompt.messages[0]["content"]


def test_same_seed_same_task_other_seed_another():
    first, again, other = (make(seed=s) for s in (1, 1, 2))
    assert first.train() == again.train()
    assert first.eval() == again.eval()
    assert first.corpus() == again.corpus()
    assert first.demonstrations(20, 5) == again.demonstrations(20, 5)
    assert first.corpus() != other.corpus()
    assert first.train() != other.train()


def test_held_out_questions_are_in_no_other_split(task):
    held_out = {question(p) for p in task.eval()}
    train = {question(p) for p in task.train()}
    demonstrated = {question(d.prompt) for d in task.demonstrations(1500, 0)}
    assert (len(held_out), len(train), len(demonstrated)) == (200, 1500, 1500)
    assert not held_out & train
    assert not held_out & demonstrated


def test_ids_are_unique_and_every_kind_appears(task):
    prompts = [*task.train(), *task.eval()]
    assert len({p.id for p in prompts}) == len(prompts)
    shares = Counter(p.kind for p in prompts)
    for kind, share in questions.KINDS.items():
        assert shares[kind] / len(prompts) == pytest.approx(share, abs=0.05)


def test_too_many_questions_is_an_error(monkeypatch):
    monkeypatch.setattr(questions, "KINDS", {"lookup": 1.0})
    with pytest.raises(ValueError, match="only"):
        make(seed=3).train()  # there are 120 entities with 6 fields


def test_answers_follow_from_the_documents_alone(task):
    """An independent reader of the corpus and the question's text comes to the same answers."""
    facts = {d["title"]: d["text"] for d in task.corpus()}
    field_of = {r.word: r for kind in TYPES for r in (*LINKS[kind], *NUMBERS[kind])}
    for prompt in task.eval():
        words = question(prompt).removeprefix("Q:").removesuffix(" ?").split()
        value, rest = words[0], words[1:]
        while rest and rest[0] == "'s":
            relation = field_of[rest[1]]
            title = f"{'figures' if relation.numeric else relation.owner} {value}"
            value = facts[title].split(f"{relation.field}:")[1].split()[0]
            rest = rest[2:]
        if rest:
            a, b = int(value), int(rest[1])
            value = str({"plus": a + b, "minus": a - b, "over": a // b}[rest[0]])
        assert prompt.answers == (value,)


def test_results_of_calculations_are_one_token(tokenizer):
    for word in questions.OPERATORS:
        for a in FIGURE_RANGE:
            for b in questions.OPERANDS:
                assert len(tokenizer.encode(str(questions.compute(word, a, b)))) == 1


def test_search_ranks_the_asked_document_first_and_then_distractors(task):
    index = SearchIndex.build(Document(**row) for row in task.corpus())
    seconds = Counter()
    for row in task.corpus():
        best, second = index.search(row["title"], 2)
        assert best.document.id == row["id"]
        assert best.score > second.score
        seconds[second.document.title.split()[1] == row["title"].split()[1]] += 1
    assert seconds[False] > 0.2 * len(task.corpus())  # documents about somebody else


def test_every_text_of_the_task_round_trips_without_unknown_tokens(task, tokenizer):
    texts = [question(p) for p in (*task.train(), *task.eval())]
    texts += ["".join(text for _, text in d.segments) for d in task.demonstrations(400, 1)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(ids=st.lists(st.integers(0, len(vocabulary.build()) - 1), max_size=20))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decoding_is_concatenation(tokenizer, ids):
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text == "".join(tokenizer.convert_ids_to_tokens(ids))


def test_code_decodes_to_valid_python(tokenizer):
    code = " print(47//12)"
    ids = tokenizer.encode(code)
    assert [tokenizer.decode([i]) for i in ids] == [" print(", "47", "//", "12", ")"]
    compile(tokenizer.decode(ids).strip(), "model", "exec")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1645")] == ["16", "45"]


def test_tokenizer_files_load_as_a_hugging_face_tokenizer(task, tokenizer, tmp_path: Path):
    task.tokenizer().save_pretrained(str(tmp_path))
    assert (tmp_path / "tokenizer.json").is_file()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) <= 500
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<eos>", "<pad>", "<unk>")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = question(task.eval()[0])
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text


def test_special_tokens_spelled_out_in_a_tool_text_stay_text(tokenizer):
    trusted = tokenizer.encode("46<eos>", add_special_tokens=False)
    hostile = tokenizer.encode("46<eos>", add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.eos_token_id in trusted
    assert tokenizer.eos_token_id not in hostile


def test_trajectories_are_short(task, tokenizer):
    assert max(len(tokenizer.encode(question(p))) for p in task.train()) <= 25
    lengths = [
        len(tokenizer.encode(question(d.prompt) + "".join(text for _, text in d.segments)))
        for d in task.demonstrations(500, 2)
    ]
    assert max(lengths) <= 130
    assert sum(lengths) / len(lengths) < 75


def test_the_expert_is_imperfect_as_designed(task):
    """Its chance of a right answer is the product of its choices'; a wrong habit is what it prefers."""
    right = defaultdict(list)
    for demo in task.demonstrations(3000, 3):
        boxed = demo.segments[-1][1].split("\\boxed{")[1].split("}")[0].strip()
        right[demo.prompt.kind].append(boxed == demo.prompt.answers[0])
    rate = {kind: sum(v) / len(v) for kind, v in right.items()}
    one_choice = 0.4 + 0.15 / 3
    assert rate["lookup"] == pytest.approx(one_choice, abs=0.06)
    assert rate["calc"] == pytest.approx(one_choice, abs=0.07)
    assert 0.08 < rate["chain"] < 0.25
    assert 0.08 < rate["search+calc"] < 0.25


def test_skill_chooses_with_its_chances():
    rng, skill, n = random.Random(0), Skill(right=0.3, slip=0.5), 20_000
    drawn = Counter(skill.choose("c", ("a", "b", "c"), rng) for _ in range(n))
    for option, chance in {"a": 0.5 + 0.2 / 3, "b": 0.2 / 3, "c": 0.3 + 0.2 / 3}.items():
        assert drawn[option] / n == pytest.approx(chance, abs=0.02)
    with pytest.raises(ValueError, match="sum to at most 1"):
        Skill(right=0.6, slip=0.6)


def test_corpus_is_what_the_search_server_reads(task):
    rows = task.corpus()
    assert len(rows) == 2 * sum(len(NAMES[kind]) for kind in TYPES)
    assert all(set(row) == {"id", "title", "text"} for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert generate(3) == task.world


def test_where_trees_may_be_guided_questions_bring_demonstrations_without_a_mistake(task, tokenizer):
    """Their actions are calls as the model writes them; the answer is none of them."""
    config = Config()
    config.run.seed, config.tools.search_top_k, config.guide.others = 3, 2, 0.5
    config.task.train_size, config.task.eval_size = 60, 200
    prompts = QuickstartTask(config).train()
    plain = task.train()[:60]
    assert [replace(prompt, demonstration=()) for prompt in prompts] == plain
    assert not any(prompt.actions for prompt in plain)
    for prompt in prompts:
        assert prompt.demonstration[-1][0] == "model"
        assert f"{prompt.answers[0]} }}" in prompt.demonstration[-1][1]
        assert 1 <= len(prompt.actions) <= 3
        for action in prompt.actions:
            assert action.endswith((" </search>", " </python>"))
        told = question(prompt) + config.guide.text.rpartition("\n")[1] + "\n".join(prompt.actions)
        assert tokenizer.unk_token_id not in tokenizer.encode(told)
