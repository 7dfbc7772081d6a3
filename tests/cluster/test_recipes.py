"""Every recipe for GPUs: its layout divides, its memory fits, its job script is sound, and the released ones
are what was released."""

import shutil
import subprocess
from pathlib import Path

import pytest

from actors.cli.main import main
from system.cluster.placement import paper_nodes, place, spare_gpus
from system.cluster.script import render
from system.config import Config, load
from system.doctor import cluster_checks, gpu_checks
from system.doctor.cluster_facts import Nodes, NodeSeen
from system.doctor.finding import Level
from system.doctor.gpu_facts import LEARNER, SGLANG, Stack, TorchSeen
from system.doctor.preflight import look
from system.models.known import shape_of
from system.observe.rundir import RunDir
from system.plan import plan

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if load(path).cluster.gpus_per_node)


def test_there_are_recipes_for_every_size() -> None:
    sizes = [f"qwen3-{size}b-{nodes}x8" for size in (14, 32) for nodes in (2, 4, 8, 16)]
    released = ["arpo-7b-reasoning", "arpo-llama-8b-reasoning", "arpo-8b-deepsearch", "arpo-14b-deepsearch"]
    sparse = [f"qwen3-30b-a3b-{nodes}x8" for nodes in (1, 2, 4)]
    assert {path.stem for path in RECIPES} == {
        *sizes,
        *sparse,
        *released,
        "qwen3-14b-1x8",
        "qwen3-32b-lora-1x8",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_layout_divides_and_fits(path: Path) -> None:
    config = load(path)
    learn, shape, cluster = config.learn, shape_of(config.model), config.cluster
    for whole, part in (
        *((size, learn.tp) for size in shape.divided(whole_experts=learn.ep > 1).values()),
        *((size, config.engine.tp) for size in shape.divided().values()),
        (shape.experts.count if shape.experts else 1, learn.ep), (cluster.gpus_per_node, learn.ep),
        (shape.layers, learn.pp), (shape.heads, config.engine.tp), (shape.kv_heads, config.engine.tp),
        (cluster.gpus_per_node, learn.tp),        (cluster.gpus_per_node, config.engine.tp),
        (config.flow.batch_leaves // config.rollout.leaves, learn.updates),
    ):  # fmt: skip
        assert whole % part == 0
    nodes = paper_nodes(config)
    seats = place(config, nodes)
    assert spare_gpus(seats, nodes) == 0
    for first in range(0, learn.ranks, learn.tp):  # a tensor-parallel group: one node
        group = [
            seat.node for seat in seats if seat.actor in {f"learner-{first + i}" for i in range(learn.tp)}
        ]
        assert len(set(group)) == 1
    made = plan(config, gpu=cluster.gpu)
    assert made.fits, made.problems
    assert made.engines == config.engine.replicas
    assert made.learner_memory.total < 0.9 * made.gpu.memory
    # The cache of an engine holds a whole tree at full length, if not every branch in flight.
    assert made.kv_tokens > config.rollout.leaves * config.engine.max_context


RELEASED = {
    "arpo-7b-reasoning": (10_000, 2, 128, 16, 16, 8, 1536, 4096, 3),
    "arpo-llama-8b-reasoning": (10_000, 2, 128, 16, 16, 8, 1536, 4096, 3),  # the 7B script's
    "arpo-8b-deepsearch": (1_071, 5, 128, 16, 16, 8, 2000, 10_000, 6),
    "arpo-14b-deepsearch": (1_071, 5, 64, 8, 12, 6, 2000, 6192, 6),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_recipes_have_the_released_settings(name: str) -> None:
    rows, epochs, prompts, mini, n, roots, prompt, response, calls = RELEASED[name]
    config = load(CONFIGS / f"{name}.yaml")
    rollout, flow, learn = config.rollout, config.flow, config.learn
    assert config.run.steps == rows // prompts * epochs  # verl drops an epoch's last, smaller batch
    assert flow.batch_leaves == prompts * n
    assert learn.updates == prompts // mini
    assert (rollout.leaves, rollout.roots, rollout.call_limit) == (n, roots, calls)
    assert rollout.max_response_tokens == response
    assert config.engine.max_context == prompt + response
    assert 2 * (prompt + response) <= learn.micro_tokens < 2 * (prompt + response) + 128
    assert (learn.lr, learn.weight_decay, learn.grad_clip, learn.warmup_steps) == (1e-6, 0.01, 1.0, 0)
    assert (learn.clip_low, learn.clip_high, learn.dual_clip) == (0.2, 0.2, 3.0)
    assert (learn.kl_coef, learn.entropy_coef, learn.aggregate.name) == (0.0, 0.0, "token-mean")
    assert (config.branching.alpha, config.branching.beta) == (0.5, 0.2)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, -1)
    assert flow.staleness == 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_dry_run_shows_plan_and_script(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(path), "--dry-run", "--time", "1-00:00:00", "slurm.account=trees"]) == 0
    shown = capsys.readouterr().out
    config = load(path)
    assert "node-0 [8/8 GPUs]: driver, learner ranks 0-" in shown
    learn = config.learn
    assert f"tp {learn.tp} x pp {learn.pp} x cp {learn.cp} x dp {learn.dp}" in shown
    assert "GiB per GPU" in shown
    assert f"#SBATCH --nodes={config.cluster.nodes}\n" in shown
    assert "#SBATCH --time=1-00:00:00\n" in shown
    assert "#SBATCH --account=trees\n" in shown
    assert "nothing was submitted" in shown
    assert "lines, the same in every job: slurm/lib.sh\n" in shown
    assert "on_signal()" not in shown, "the plan stays in sight"
    assert not Path(config.run.dir, f"{path.stem}-s0", "slurm").exists()


def test_a_supervised_run_is_submitted_for_its_learner_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["submit", str(CONFIGS / "sft" / "arpo-8b.yaml"), "--sft", f"run.dir={tmp_path}"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "node-0 [8/8 GPUs]: driver, learner ranks 0-7\n" in shown.out
    assert "engines: none" in shown.out
    assert "no engines beside it" in shown.out
    assert "arpo-8b-sft-s0" in shown.out
    assert "WARNING: sft.path: no such data file" in shown.err
    assert main(words) == 2
    assert "sft.path: no such data file" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    assert main([*words, "--sweep", "sft.epochs=1,2"]) == 2
    assert "submit supervised runs one by one" in capsys.readouterr().err


def test_a_run_that_is_submitted_again_is_known_for_what_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = load(CONFIGS / "quickstart.yaml", [f"run.dir={tmp_path}"])
    trained, taught = RunDir.create(config), RunDir.create(config, supervised=True)
    assert main(["submit", "--resume", str(taught.root), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "engines: none" in shown.out
    assert "WARNING: sft.path: empty" in shown.err
    assert main(["submit", "--resume", str(trained.root), "--sft", "--dry-run"]) == 2
    assert f"{trained.root} is no supervised run: leave --sft out" in capsys.readouterr().err
    assert main(["status", str(taught.root)]) == 0
    told = capsys.readouterr().out
    assert f"run {taught.root} (supervised)" in told
    assert "step 0 of ?" in told


MISSING = {"model.path", "task.path", "task.eval_path"}  # the user's own: the model, the data


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_sound_cluster_has_nothing_against_it(
    path: Path,
) -> None:
    """The doctor's static part."""
    config = load(path)
    found = [problem for problems in look(config, login=True).values() for problem in problems]
    assert {problem.field or str(problem).split(":")[0] for problem in found} <= MISSING
    stack = Stack(
        driver=(580, 1),
        glibc=(2, 35),
        compiler="/usr/bin/cc",
        interpreters={LEARNER: TorchSeen("2.13.0", "13.0"), SGLANG: TorchSeen("2.14.1", "13.0")},
        gpus=config.cluster.gpus_per_node,
        memlock=-1,
    )
    each = [
        NodeSeen(f"n{n}", 0.1, "", "580.1", config.cluster.gpus_per_node) for n in range(config.cluster.nodes)
    ]
    nodes = Nodes(config.cluster.nodes, tuple(each))
    judged = [*gpu_checks.examine(stack, config), *cluster_checks.examine(nodes, config)]
    assert len(judged) >= 10
    assert {finding.level for finding in judged} == {Level.OK}


VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "pyxis": ["slurm.container=pyxis", "slurm.image=/images/espalier.sqsh", "slurm.mounts=[/data:/data]"],
    "apptainer": ["slurm.container=apptainer", "slurm.image=/images/espalier.sif"],
    "heterogeneous": ["slurm.heterogeneous=true", "slurm.rollout_sbatch=[--constraint=inference]"],
    "quoting": ['slurm.env={NAME: "it\'s $HOME; rm -rf /"}', "slurm.setup=[module load cuda]"],
    "keep going": ["cluster.on_node_loss=continue", "slurm.requeue=false"],
}


def script(*overrides: str, config: Config | None = None, **more: object) -> str:
    config = config or load(CONFIGS / "qwen3-14b-4x8.yaml", overrides)
    return render(config, Path("/runs/job"), **more)  # type: ignore


@pytest.mark.parametrize("name", VARIANTS)
def test_scripts_are_sound_bash(name: str, tmp_path: Path) -> None:
    for number, text in enumerate(
        (script(*VARIANTS[name]), script(*VARIANTS[name], points=[Path("/runs/job/points/000")] * 3, limit=2))
    ):
        path = tmp_path / f"{number}.sh"
        path.write_text(text)
        checks = [["bash", "-n", str(path)]]
        if shutil.which("shellcheck"):
            checks.append(["shellcheck", "--severity=warning", str(path)])
        for check in checks:
            done = subprocess.run(check, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr


def test_no_partition_or_account_is_assumed() -> None:
    assert "--partition" not in script()
    assert "--account" not in script()


def test_containers_wrap_every_node_and_mount_the_run_directory() -> None:
    text = script(*VARIANTS["pyxis"])
    assert (
        "LAUNCH=(--container-image=/images/espalier.sqsh --container-mounts=/runs/job:/runs/job,/data:/data)"
        in text
    )
    assert "VIRTUAL_ENV" not in text  # the image has its own python
    assert "LAUNCH=(apptainer exec --nv --bind /runs/job:/runs/job /images/espalier.sif)" in script(
        *VARIANTS["apptainer"]
    )


def test_a_heterogeneous_job_has_two_components() -> None:
    first, second = script(*VARIANTS["heterogeneous"]).split("#SBATCH hetjob\n")
    assert "#SBATCH --nodes=2\n" in first
    assert "#SBATCH --nodes=2\n" in second
    assert "#SBATCH --constraint=inference\n" in second
    assert "SRUN_OPTIONS='--het-group=0,1 " in second


def test_values_cannot_break_out_of_their_quotes(tmp_path: Path) -> None:
    text = script(*VARIANTS["quoting"])
    (line,) = [line for line in text.splitlines() if line.startswith("export NAME=")]
    done = subprocess.run(
        ["bash", "-c", f'{line}; printf %s "$NAME"'], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "it's $HOME; rm -rf /"
