"""Plans: parameter counts against published ones, memory against hand counts, the bottleneck by cause."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from actors.cli.main import main
from system.config import Config, ConfigError, LearnConfig, LoraConfig, ModelConfig, PartConfig, load
from system.models.known import KNOWN, shape_of
from system.plan import AgentWorkload, plan, text
from system.plan.hardware import GIB, GPUS
from system.plan.memory import (
    EngineLayout,
    activation_bytes_per_token,
    adapter_parameters,
    engine_memory,
    host_memory,
    kv_capacity,
    learner_memory,
)
from system.plan.speed import EngineRoofline, LearnerRoofline, PublishRoofline

SEVEN = KNOWN["qwen2.5-7b"]
H100 = GPUS["h100"]
PPO = PartConfig("ppo")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2.5-0.5B", 0.494),
        ("Qwen2.5-7B", 7.616),
        ("Qwen2.5-14B", 14.770),
        ("Qwen2.5-32B", 32.764),
        ("Qwen3-0.6B", 0.596),
        ("Qwen3-8B", 8.191),
        ("Qwen3-14B", 14.768),
        ("Qwen3-32B", 32.762),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, billions: float) -> None:
    assert KNOWN[name.lower()].parameters / 1e9 == pytest.approx(billions, rel=5e-4)


def test_count_agrees_with_the_model_that_transformers_builds(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    config.save_pretrained(tmp_path)
    shape = shape_of(ModelConfig(path=str(tmp_path)))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_fine_tunes_are_known_by_their_base_and_strangers_are_refused() -> None:
    assert shape_of(ModelConfig(path="Qwen/Qwen2.5-7B-Instruct")) is SEVEN
    with pytest.raises(ConfigError, match=r"neither a directory .* nor one of .*Qwen3-8B"):
        shape_of(ModelConfig(path="llama-7b"))


def test_states_of_a_rank_are_18_bytes_per_parameter_in_bf16() -> None:
    layout = LearnConfig(tp=1, dp=4)
    parts = learner_memory(SEVEN, layout).parts
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert states == pytest.approx(18 * SEVEN.parameters, rel=1e-3)
    split = learner_memory(SEVEN, replace(layout, distributed_optimizer=True)).parts
    assert split["optimizer"] == pytest.approx(parts["optimizer"] / 4)
    assert split["weights"] == parts["weights"]


def test_tensor_and_pipeline_parallelism_divide_the_states() -> None:
    whole = learner_memory(SEVEN, LearnConfig(tp=1)).parts["weights"]
    assert learner_memory(SEVEN, LearnConfig(tp=4)).parts["weights"] == pytest.approx(whole / 4, rel=1e-3)
    staged = learner_memory(SEVEN, LearnConfig(tp=1, pp=4)).parts["weights"]
    table = 2 * SEVEN.embedding  # bytes; a stage holds at most one of the two tables
    assert staged == pytest.approx((whole - 2 * table) / 4 + table, rel=1e-3)


def test_activations_by_hand_and_by_switch() -> None:
    # Qwen2.5-7B in bf16: 4·3584 norms, (4·28 + 3·4)·128 attention, 3·18944 MLP numbers per token and layer.
    whole, kept = activation_bytes_per_token(SEVEN, LearnConfig(tp=1))
    assert whole == kept == 2 * (4 * 3584 + 124 * 128 + 3 * 18_944)
    sequence = activation_bytes_per_token(SEVEN, LearnConfig(tp=4, sequence_parallel=True))
    assert sequence[0] == whole / 4
    order = [
        activation_bytes_per_token(SEVEN, LearnConfig(tp=1, recompute=name))[1]
        for name in ("none", "selective", "full")
    ]
    assert order[0] > order[1] > order[2] == 2 * 3584


def test_the_plan_is_what_an_h100_measured() -> None:
    """`espalier bench gpu`: half of a Qwen3-14B tp=4 shard, rows of 18,432 tokens (docs/results/gpu.md)."""
    shard = replace(KNOWN["qwen3-14b"], layers=20, heads=10, kv_heads=2, ffn=4352, vocab=37_984)
    logits = 2 * 2 * (5120 + 37_984) * 18_432  # of the whole row, as it was then
    for recompute, peak_gib in (("full", 42.0), ("selective", 49.1), ("none", 65.2)):
        parts = learner_memory(shard, LearnConfig(tp=1, micro_tokens=18_432, recompute=recompute)).parts
        assert parts["logits"] < logits / 2
        total = sum(parts.values()) - parts["logits"] + logits
        assert total / 2**30 == pytest.approx(peak_gib, rel=0.01)


def test_an_offloaded_optimizer_is_in_the_hosts_memory_split_over_the_copies() -> None:
    device, host = (LearnConfig(tp=4, dp=2, offload=offload) for offload in (False, True))
    parts = learner_memory(SEVEN, device).parts
    assert learner_memory(SEVEN, host).total == pytest.approx(sum(parts.values()) - parts["optimizer"])
    assert host_memory(SEVEN, host).parts["optimizer"] == pytest.approx(parts["optimizer"] / 2)
    shared = host_memory(SEVEN, replace(host, cp=3)).parts["optimizer"]
    assert shared == pytest.approx(parts["optimizer"] / 6)
    assert host_memory(SEVEN, device).total == 0


def test_kv_cache_takes_what_the_weights_leave() -> None:
    assert SEVEN.kv_bytes_per_token() == 2 * 28 * 4 * 128 * 2
    layout = EngineLayout(tp=2)
    parts = engine_memory(SEVEN, layout, H100.memory).parts
    assert sum(parts.values()) == pytest.approx(H100.memory)
    assert kv_capacity(SEVEN, layout, H100.memory) == pytest.approx(
        2 * parts["KV cache"] / SEVEN.kv_bytes_per_token(), rel=1e-6
    )
    assert kv_capacity(KNOWN["qwen3-32b"], EngineLayout(tp=1, memory_share=0.5), H100.memory) == 0


def test_a_decode_step_reads_the_weights_once_however_many_share_it() -> None:
    roof = EngineRoofline(SEVEN, EngineLayout(), H100)
    alone, many = roof.step_s(1, 1000), roof.step_s(64, 64_000)
    assert alone >= 2 * SEVEN.active / H100.hbm
    assert many < 2 * alone
    assert roof.step_s(2000, 2e5) > roof.step_s(1000, 2e5)  # at last the products count


def test_training_time_falls_with_ranks_until_a_batch_has_no_more_micro_batches() -> None:
    def seconds(dp: int) -> float:
        return LearnerRoofline(SEVEN, LearnConfig(tp=4, dp=dp), H100).train_s(64 * 4096)

    assert seconds(1) > 1.8 * seconds(2)
    assert seconds(128) > 0.95 * seconds(64)


def test_a_learner_alone_is_as_fast_as_an_h100_was() -> None:
    """`espalier bench gpu` (docs/results/gpu.md): tokens/s of half a Qwen3-14B tp=4 shard, rows of one tree
    of 16 leaves that share half of it.
    """
    shard = replace(KNOWN["qwen3-14b"], layers=20, heads=10, kv_heads=2, ffn=4352, vocab=37_984)
    shared, own = 9216, 576
    context = (shared * shared / 2 + 16 * (own * shared + own * own / 2)) / 18_432
    for recompute, tokens_s in (("full", 29_800), ("selective", 32_600), ("none", 38_600)):
        roof = LearnerRoofline(shard, LearnConfig(tp=1, recompute=recompute), H100, context)
        assert 0.94 * tokens_s < 1 / roof.token_s < tokens_s


def test_what_is_recomputed_exchanged_or_scored_once_more_costs_time() -> None:
    def token_s(**learn: object) -> float:
        return LearnerRoofline(SEVEN, LearnConfig(**learn), H100, context=4096).token_s  # type: ignore

    one = [token_s(tp=1, recompute=recompute) for recompute in ("none", "selective", "full")]
    assert one == sorted(one)
    assert one[2] == pytest.approx(one[0] * 8 / 6, rel=0.05)
    assert token_s(tp=4) * 4 > 1.1 * token_s(tp=1)  # the exchange
    again = token_s(tp=1, updates=4) / token_s(tp=1)
    assert again == pytest.approx(1 + 0.75 / 3)  # three quarters of the tokens, a forward pass
    assert LearnerRoofline(SEVEN, LearnConfig(tp=1), H100).mfu == pytest.approx(H100.train_mfu)
    assert LearnerRoofline(SEVEN, LearnConfig(tp=4, recompute="full"), H100).mfu < 0.75 * H100.train_mfu


def test_every_forward_pass_that_the_trainer_takes_costs_a_third_of_a_step() -> None:
    def passes(**learn: object) -> float:
        roof, alone = (
            LearnerRoofline(SEVEN, LearnConfig(tp=1, **one), H100, context=4096)  # type: ignore
            for one in (learn, {"objective": PPO})
        )
        return 3 * (roof.token_s / alone.token_s - 1)

    for learn, expected in (
        ({}, 0.0),  # decoupled, whose first update needs none
        ({"updates": 4}, 0.75),
        ({"updates": 4, "proximal": "closed"}, 0.0),  # known from the engines
        ({"updates": 4, "proximal": "average"}, 1.0),
        ({"objective": PPO, "updates": 4, "proximal": "average"}, 0.0),  # keeps none
        ({"objective": PPO, "teacher": "average"}, 1.0),
        ({"objective": PPO, "correction": PartConfig("seq-tis")}, 1.0),
        ({"correction": PartConfig("seq-tis"), "proximal": "closed"}, 0.0),
        ({"objective": PartConfig("m2po"), "updates": 4}, 1.0),
        ({"objective": PartConfig("m2po"), "updates": 4, "correction": PartConfig("seq-tis")}, 1.75),
        ({"objective": PPO, "kl_coef": 0.1}, 1.0),
        ({"updates": 4, "kl_coef": 0.1}, 1.75),
    ):
        assert passes(**learn) == pytest.approx(expected), learn


def test_models_that_are_kept_besides_take_memory() -> None:
    plain = learner_memory(SEVEN, LearnConfig(tp=2)).parts
    for kept, learn in (
        ("reference", LearnConfig(tp=2, kl_coef=0.1)),
        ("average", LearnConfig(tp=2, proximal="average")),
        ("teacher", LearnConfig(tp=2, teacher="average")),
    ):
        parts = learner_memory(SEVEN, learn).parts
        each = 1 if kept == "reference" else 3  # an average is kept in float32, and computes in bfloat16
        assert parts == {**plain, kept: each * plain["weights"], "reserved": parts["reserved"]}
    assert "average" not in learner_memory(SEVEN, LearnConfig(proximal="average", objective=PPO)).parts


def test_a_flat_objective_trains_on_whole_paths() -> None:
    flat = plan(config("learn.objective=grpo-flat"), gpus=8).forecast.train_s
    assert flat > 1.3 * plan(config("learn.objective=ppo"), gpus=8).forecast.train_s


def test_a_pipeline_waits_in_every_update_and_for_the_stage_with_the_head() -> None:
    def train_s(**learn: int) -> float:
        return LearnerRoofline(SEVEN, LearnConfig(tp=1, objective=PPO, **learn), H100).train_s(32 * 4096)  # type: ignore

    assert train_s(pp=4) > train_s(pp=1) / 4 * (1 + 3 / 32) * 1.1
    assert train_s(pp=4, updates=4) > 1.2 * train_s(pp=4)


def test_weights_are_published_in_the_time_of_one_transfer_whatever_the_number_of_servers() -> None:
    few, many = (plan(config(), gpus=gpus).forecast for gpus in (16, 64))
    assert few.pause_s == many.pause_s
    learn, size = LearnConfig(tp=4, bucket_mb=1024), 2 * SEVEN.parameters
    far = PublishRoofline(SEVEN, learn, EngineLayout(tp=2), H100)
    assert far.size == size
    assert far.pause_s > size / (H100.network * H100.network_share) + H100.swap_s
    near = replace(far, one_node=True)
    assert near.pause_s < far.pause_s / 1.4
    assert plan(config(), gpus=8).forecast.pause_s < few.pause_s  # one machine
    small = replace(far, learn=LearnConfig(tp=4, bucket_mb=64))
    assert small.pause_s - far.pause_s == pytest.approx((227 - 15) * H100.bucket_s)


def test_the_engines_memory_is_what_sglangs_flag_says() -> None:
    sglang = ["engine=sglang", "engine.sglang={mem_fraction_static: 0.6}"]
    less = plan(config(*sglang), gpus=8)
    assert less.engine_memory.parts["reserved"] == pytest.approx(0.4 * H100.memory)
    assert plan(config("engine=sglang"), gpus=8).engine.memory_share == EngineLayout().memory_share
    assert less.kv_tokens < plan(config(), gpus=8).kv_tokens
    with pytest.raises(ConfigError, match=r"engine.sglang.mem_fraction_static=80: .* between 0 and 1"):
        plan(config("engine=sglang", "engine.sglang={mem_fraction_static: 80}"), gpus=8)
    tight = plan(config("engine=sglang", "engine.sglang={mem_fraction_static: 0.15}"), gpus=8)
    assert any("mem_fraction_static (it is 0.15)" in problem for problem in tight.problems)


def test_float8_in_an_engine_is_a_byte_a_weight_and_a_byte_a_number_of_its_cache() -> None:
    """All but embedding, head, norms and biases; and a scale for each row."""
    half = plan(config("engine=sglang", "model.dtype=bfloat16"), gpus=8)
    words = ["engine=sglang", "model.dtype=bfloat16"]
    weights = plan(config(*words, "engine.sglang={quantization: fp8, load_format: flash_rl}"), gpus=8)
    cache = plan(config(*words, "engine.sglang={kv-cache-dtype: fp8_e4m3}"), gpus=8)
    shape, tp = half.shape, half.engine.tp
    q, kv, ffn, wide = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.ffn, shape.hidden
    matrices = shape.layers * (2 * q * wide + 2 * kv * wide + 3 * ffn * wide)
    scales = 4 * shape.layers * (q + 2 * kv + wide + 2 * ffn + wide)
    found = weights.engine_memory.parts["weights"] * tp
    assert found == pytest.approx(2 * (shape.parameters - matrices) + matrices + scales)
    assert half.engine_memory.parts["weights"] * tp == 2 * shape.parameters
    assert weights.kv_tokens > half.kv_tokens
    assert cache.kv_tokens == pytest.approx(2 * half.kv_tokens, abs=1)
    assert cache.engine_memory.parts == half.engine_memory.parts
    assert "GPU each, float8 weights (docs" in text(weights)
    assert "GPU each, float8 KV cache (docs" in text(cache)
    assert "float8" not in text(half)
    seconds = [EngineRoofline(p.shape, p.engine, p.gpu).step_s(8, 8 * 4096) for p in (weights, half)]
    assert seconds[0] < seconds[1]


def test_no_engine_decodes_more_than_max_running() -> None:
    work = AgentWorkload(response_tokens=4000)
    free, capped = (
        plan(config(f"engine.max_running={most}"), gpus=8, workload=work).forecast for most in (4096, 32)
    )
    assert capped.running == 32 < free.running
    assert "engine.max_running lets 128" in capped.because


def config(*overrides: str) -> Config:
    return load(
        None,
        [
            "model.path=Qwen2.5-7B",
            "model.dtype=bfloat16",
            "rollout.max_response_tokens=4096",
            "engine.max_context=8192",
            "rollout.leaves=16",
            "rollout.roots=8",
            "rollout.concurrency=256",
            "flow.batch_leaves=2048",
            "learn.tp=4",
            "learn.sequence_parallel=true",
            *overrides,
        ],
    )


def test_a_sensible_layout_fits_and_uses_every_gpu() -> None:
    made = plan(config("learn.recompute=full", "learn.micro_tokens=8192"), gpus=8)
    assert made.fits, made.problems
    assert made.config.learn.ranks + made.engines * made.engine.tp == 8
    assert made.learner_memory.total < H100.memory
    assert "bottleneck" in text(made)
    assert any("engine.replicas=4" in note for note in made.notes)


def test_what_does_not_fit_says_why_and_how_to_mend_it() -> None:
    made = plan(config("learn.tp=1", "learn.sequence_parallel=false"), gpus=2)
    assert not made.fits
    assert "learn.recompute=full" in made.problems[0]
    assert f"{made.learner_memory.total / GIB:.0f} GiB" in made.problems[0]
    small = plan(config("model.path=Qwen2.5-32B", "engine.max_context=16384"), gpus=5)
    assert any("engine.tp" in problem for problem in small.problems)


@pytest.mark.parametrize(
    ("gpus", "overrides", "work", "bottleneck"),
    [
        (
            5,
            ["rollout.concurrency=16", "engine.max_running=512"],
            AgentWorkload(response_tokens=4000),
            "generation",
        ),
        (36, [], AgentWorkload(response_tokens=4000, prompt_tokens=8000, shared=0.0), "training"),
        (8, [], AgentWorkload(response_tokens=300, tool_s=60.0), "tool latency"),
        (
            5,
            ["engine.max_context=40000"],
            AgentWorkload(prompt_tokens=20_000, response_tokens=4000),
            "room in the engines",
        ),
    ],
)
def test_the_bottleneck_is_named_by_its_cause(
    gpus: int, overrides: list[str], work: AgentWorkload, bottleneck: str
) -> None:
    assert plan(config(*overrides), gpus=gpus, workload=work).forecast.bottleneck == bottleneck


def test_staleness_zero_adds_the_times_up() -> None:
    waits = plan(config("flow.staleness=0"), gpus=8).forecast
    flows = plan(config("flow.staleness=1"), gpus=8).forecast
    assert waits.step_s == pytest.approx(waits.generate_s + waits.train_s + waits.publish_s)
    engines = flows.generate_s + flows.pause_s + flows.refill_s
    assert flows.step_s == pytest.approx(max(engines, flows.train_s + flows.publish_s))
    assert flows.refill_s > 0 == waits.refill_s  # nothing runs while all wait for new weights
    assert plan(config("engine.kv_after_update=keep"), gpus=8).forecast.refill_s == 0


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["engine.tp=8"], "engine.tp=8 does not divide the model's heads=28"),
        (["engine.tp=7"], "nor is a multiple of it"),
        (["model.path=Qwen3-14B", "engine.tp=8", "cluster.gpus_per_node=4"], "which has 4 GPUs"),
        (["learn.cp=4", "learn.micro_tokens=511"], "raise it to 512 or more, or lower learn.cp"),
    ],
)
def test_what_would_fail_once_started_is_a_problem(overrides: list[str], problem: str) -> None:
    assert any(problem in one for one in plan(config(*overrides), gpus=64).problems)


def test_contexts_beyond_the_models_positions_are_told() -> None:
    long = ["engine.max_context=65536", "learn.recompute=full"]
    assert (
        "engine.max_context=65,536 needs a model of 65,536 positions, not of 32,768"
        in plan(config(*long), gpus=8).notes
    )


def test_publishing_is_forecast_for_one_way_and_says_so() -> None:
    note = "weights are published as by engine.weights=distributed, not as by disk"
    assert note in plan(config("engine=sglang", "engine.weights=disk"), gpus=8).notes
    assert not any("published" in one for one in plan(config("engine=sglang"), gpus=8).notes)


def test_data_parallel_ranks_without_a_tree_are_told() -> None:
    layout = ["learn.tp=1", "learn.sequence_parallel=false", "learn.dp=33", "learn.updates=4"]
    made = plan(config(*layout), gpus=64)
    assert made.notes[0] == "learn.dp=33 is more than the 32 trees of an update: lower it"


def test_too_few_gpus_is_an_error_that_counts_them() -> None:
    with pytest.raises(ConfigError, match=r"4 GPUs: the learner takes 4 .* and an engine 1"):
        plan(config(), gpus=4)


def test_the_command_prints_a_plan_and_fails_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": {"path": "Qwen3-8B", "dtype": "bfloat16"}}))
    assert main(["plan", str(recipe), "--gpus", "8", "learn.tp=4", "--tool-s", "2"]) == 0
    out = capsys.readouterr().out
    assert "8.19 billion parameters, on 8 x h100" in out
    assert "tool calls of 2 s" in out
    assert main(["plan", str(recipe), "--gpus", "2", "learn.tp=1"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpus 0", "--gpus 0: give 1 or more"),
        ("--response 0 --calls 0", "--response 0: give a mean of 1 to rollout.max_response_tokens=16384"),
        ("--response -5", "--response -5: give a mean of 1 to"),
        ("--response 20000", "--response 20000: give a mean of 1 to rollout.max_response_tokens=16384"),
        ("--prompt nan", "--prompt nan: give a mean of 1 to engine.max_context=18432"),
        ("--calls 11", "--calls 11: give a mean of 0 to rollout.call_limit=10"),
        ("--tool-s -3", "--tool-s -3: give a mean of 0 or more"),
        ("--tool-s inf", "--tool-s inf: give a mean of 0 or more"),
        ("--prompt 9000 --response 15000", "are 24000 tokens, more than engine.max_context=18432"),
    ],
)
def test_what_no_branch_has_is_refused_by_its_option(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(Path(__file__).parents[2] / "configs" / "qwen3-14b-4x8.yaml")
    assert main(["plan", recipe, *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("override", ["engine.replicas=100", "cluster.learner_nodes=3"])
def test_what_the_nodes_do_not_hold_does_not_fit(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).parents[2] / "configs" / "qwen3-14b-4x8.yaml")
    assert main(["plan", recipe, override]) == 1
    assert "PROBLEM: engine.replicas=" in capsys.readouterr().out
    assert main(["plan", recipe]) == 0


def test_of_a_tiny_model_it_says_what_is_there_and_nothing_that_contradicts_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = str(Path(__file__).parents[2] / "configs" / "quickstart-tp2.yaml")
    assert main(["plan", recipe, "--gpus", "64"]) == 0
    out = capsys.readouterr().out
    assert "tiny: 252,480 parameters" in out
    assert "weights 494 KiB" in out
    assert "GPU(s)" not in out
    assert not re.search(r"\b0\.0\b", out)
    assert "prompt 96, response 80 tokens" in out  # together within engine.max_context=256
    # Of 62 engines, with 7 branches that decode, hardly one has anything to do.
    assert "engines idle 89%" in out
    assert out.endswith("note: about 7 branches decode at a time: 1 engine would do, 3 GPUs in all\n")
    assert main(["plan", recipe]) == 0  # those three
    assert "note:" not in capsys.readouterr().out


# ---------------------------------------------------------------------- context parallelism


def test_context_parallelism_divides_what_a_row_needs_and_the_optimizer() -> None:
    whole = LearnConfig(tp=4, sequence_parallel=True, distributed_optimizer=True, recompute="full",
                        micro_tokens=32_768)  # fmt: skip
    alone, four = (learner_memory(SEVEN, replace(whole, cp=cp)).parts for cp in (1, 4))
    assert four["weights"] == alone["weights"]
    assert four["optimizer"] == pytest.approx(alone["optimizer"] / 4)
    # Of the head's inputs and their gradients a rank has its tokens'; a chunk of logits is as large.
    others = 3 / 4 * 2 * 2 * SEVEN.hidden * whole.micro_tokens
    assert four["logits"] == pytest.approx(alone["logits"] - others)
    # Full recomputation keeps a layer's input, and has the keys and values of the whole row in one layer: as
    # they came, in order, and the gradients of both.  4 key-value heads of 128 numbers, over tp 4.
    row = 4 * 2 * 2 * 128 * whole.micro_tokens
    assert four["activations"] == pytest.approx(alone["activations"] / 4 + row)


def test_without_recomputation_every_layer_keeps_the_whole_rows_keys_and_values() -> None:
    for recompute in ("none", "selective"):
        learn = LearnConfig(tp=2, recompute=recompute)
        alone = activation_bytes_per_token(SEVEN, learn)[1]
        assert activation_bytes_per_token(SEVEN, replace(learn, cp=3))[1] == alone + 3 * 2 * 2 * 2 * 128


def test_context_parallelism_trains_a_long_path_sooner() -> None:
    def seconds(cp: int, tokens: float = 131_072) -> float:
        learn = LearnConfig(tp=8, cp=cp, micro_tokens=131_072)
        roof = LearnerRoofline(KNOWN["qwen3-14b"], learn, H100, tokens / 2)
        return roof.train_s(tokens) - roof.train_s(0.0)

    assert 3.5 < seconds(1) / seconds(4) < 4  # what is lost goes into the keys and values that travel
    assert seconds(1) > 1.5 * 4 * seconds(1, 32_768)  # attention takes more per token


def test_keys_and_values_travel_faster_within_a_machine_and_once_more_where_layers_are_recomputed() -> None:
    def exchange_s(tp: int, cp: int, node: int = 8, recompute: str = "none") -> float:
        """What all ranks together take longer for a token than without context parallelism."""
        learn = LearnConfig(tp=tp, cp=cp, recompute=recompute)
        roofs = (LearnerRoofline(SEVEN, made, H100, node=node) for made in (learn, replace(learn, cp=1)))
        shared, alone = (roof.token_s for roof in roofs)
        return shared - alone / cp

    keys_and_values = 2 * 2 * 4 * 128 * 28 * 3 / 4  # bytes that a rank of tp=1, cp=4 has from the others
    assert exchange_s(1, 4) == pytest.approx(2 * keys_and_values / (H100.nvlink * H100.nvlink_share))
    far = exchange_s(1, 4, node=2)
    assert far == pytest.approx(2 * keys_and_values / (H100.network * H100.network_share))
    assert exchange_s(1, 4, node=2, recompute="full") == pytest.approx(1.5 * far)
    assert exchange_s(2, 4, node=4) == pytest.approx(far / 2)  # each has half of the heads


def test_a_path_beyond_the_row_is_counted_as_a_row() -> None:
    long = ("engine.max_context=65536", "learn.recompute=full")
    short, enough = plan(config(*long), gpus=8), plan(config(*long, "learn.micro_tokens=65536"), gpus=8)
    assert short.learner_memory == enough.learner_memory
    assert "micro-batches of up to 65,536 tokens" in text(short)


def test_the_documented_long_contexts_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command of docs/layout.md, and of its forecasts the memory and the seconds of one path."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "layout.md").read_text()
    commands = re.findall(r"^espalier (plan configs/.*)$", page, re.MULTILINE)
    rows = re.findall(r"^\| (\d+)B \| (\d+)k \| (\d) \| (\d+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(commands) == 6
    assert len(rows) == 18
    for command in commands:
        verb, recipe, *overrides = command.split()
        assert main([verb, str(root / recipe), *overrides]) == 0, command
        assert "PROBLEM" not in capsys.readouterr().out
    for size, length, cp, gib, seconds in rows:
        shape, tokens = KNOWN[f"qwen3-{size}b"], 1024 * int(length)
        learn = LearnConfig(tp=8, cp=int(cp), micro_tokens=tokens, recompute="full", sequence_parallel=True,
                            distributed_optimizer=True)  # fmt: skip
        memory = learner_memory(shape, learn, reserved=H100.reserved).total / GIB
        roof = LearnerRoofline(shape, learn, H100, tokens / 2)
        took = roof.train_s(tokens) - roof.train_s(0.0)
        assert (f"{memory:.0f}", f"{took:.1f}") == (gib, seconds), (size, length, cp)


def test_adapters_are_all_that_has_gradients_and_an_optimizer() -> None:
    """By hand, of Qwen3-14B: r·(in + out) numbers for each of 7 projections of 40 layers."""
    shape = KNOWN["qwen3-14b"]
    lora = LearnConfig(tp=2, pp=2, distributed_optimizer=True, dp=2, lora=LoraConfig(rank=16), kl_coef=0.1)
    h, f, q, kv = 5120, 17_408, 5120, 1024
    each = 16 * ((h + q) + 2 * (h + kv) + (q + h) + 2 * (h + f) + (f + h))
    assert adapter_parameters(shape, lora) == 40 * each == 64_225_280
    whole = 16 * (3 * h + 2 * h + h + h)  # A of q, k, v, gate, up and B of o, down: on every rank
    on_rank = 20 * (whole + (each - whole) / 2)
    assert adapter_parameters(shape, lora, 0) == on_rank
    parts, before = learner_memory(shape, lora).parts, learner_memory(shape, replace(lora, lora=LoraConfig()))
    assert parts["gradients"] == 4 * on_rank
    assert parts["optimizer"] == 12 * on_rank / 2
    assert parts["reference"] == 2 * on_rank
    assert parts["weights"] == before.parts["weights"] + 2 * on_rank
    some = replace(lora, lora=LoraConfig(rank=8, targets=["q", "v"]))
    assert adapter_parameters(shape, some) == 40 * 8 * (h + q + h + kv)
    on_host = host_memory(shape, replace(lora, offload=True)).parts["optimizer"]
    assert on_host == 12 * on_rank / 2


def test_adapters_are_trained_sooner_and_travel_as_megabytes() -> None:
    shape, whole = KNOWN["qwen3-14b"], LearnConfig(tp=4)
    lora = replace(whole, lora=LoraConfig(rank=16))
    before, after = (LearnerRoofline(shape, learn, H100).train_s(1e6) for learn in (whole, lora))
    assert 0.6 < after / before < 0.75  # four of six products, and the exchange
    sizes = [
        PublishRoofline(shape, lora, EngineLayout(), H100, adapters=apart).size for apart in (True, False)
    ]
    assert sizes == [2 * 64_225_280, 2 * shape.parameters]
    for engine, says in (
        ("embedded", "122.5 MiB a version travel (adapters alone)"),
        ("sglang", "122.5 MiB a version travel (adapters alone)"),
        ("sglang learn.lora.sync=merged", "27.5 GiB a"),
        ("sglang learn.lora.sync=adapter", "122.5 MiB a version travel (adapters alone)"),
        ("embedded learn.lora.sync=merged", "27.5 GiB a"),
    ):
        words = [
            *f"engine={engine}".split(),
            "model.path=Qwen3-14B",
            "learn.lora.rank=16",
            "model.dtype=bfloat16",
        ]
        shown = text(plan(load(None, words), 8))
        assert "LoRA of rank 16 on q, k, v, o, gate, up, down: 64.2 million numbers are trained; " in shown
        assert says in shown
