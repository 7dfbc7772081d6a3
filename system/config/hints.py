"""What somebody may have meant by a key that there is not."""

from __future__ import annotations

from collections.abc import Sequence

from system.config.settings import settings
from system.plugins import nearest

OTHER_NAMES = {
    "model.path": "model_name_or_path pretrain hf_checkpoint",
    "task.path": "train_files prompt_data dataset_path",
    "task.eval_path": "val_files eval_prompt_data",
    "run.steps": "max_steps total_training_steps num_rollout",
    "run.dir": "output_dir default_local_dir save_path",
    "rollout.leaves": "n num_generations n_samples_per_prompt n_samples group_size rollout_n",
    "rollout.max_response_tokens": "max_completion_length max_response_length max_new_tokens",
    "rollout.call_limit": "max_turns max_assistant_turns max_tool_calling_iterations",
    "flow.batch_leaves": "batch_size train_batch_size global_batch_size per_device_train_batch_size",
    "rollout.concurrency": "max_concurrent_rollouts num_parallel_generation_workers max_inflight "
    "max_inflight_tasks",
    "flow.staleness": "max_head_offpolicyness staleness_threshold max_staleness_steps max_async_level",
    "flow.max_staleness": "max_off_policy_steps",
    "flow.skip_silent": "dynamic_sampling filter_groups",
    "sft.epochs": "num_train_epochs",
    "sft.max_tokens": "cutoff_len max_seq_length",
    "sft.warmup": "warmup_ratio",
    "learn.lr": "learning_rate actor_learning_rate",
    "learn.credit": "advantage_estimator adv_estimator",
    "learn.objective": "policy_loss loss_mode",
    "learn.aggregate": "loss_type loss_agg_mode",
    "learn.updates": "num_iterations ppo_epochs ppo_n_minibatches",
    "learn.clip_low": "epsilon clip_ratio cliprange eps_clip clip_ratio_low",
    "learn.clip_high": "epsilon_high clip_ratio_high eps_clip_high",
    "learn.kl_coef": "kl_loss_coef init_kl_coef kl_ctl",
    "learn.entropy_coef": "entropy_coeff",
    "learn.grad_clip": "max_grad_norm max_norm clip_grad gradient_clipping",
    "learn.tp": "tensor_model_parallel_size tensor_parallel_size",
    "learn.pp": "pipeline_model_parallel_size pipeline_parallel_size",
    "learn.cp": "context_parallel_size ulysses_sequence_parallel_size sequence_parallel_size",
    "eval.every": "eval_steps test_freq eval_interval",
    "checkpoint.every": "save_steps save_freq save_interval",
    "observe.wandb": "report_to use_wandb",
    "observe.project": "project_name wandb_project",
    "cluster.nodes": "nnodes num_nodes actor_num_nodes",
    "cluster.gpus_per_node": "n_gpus_per_node num_gpus actor_num_gpus_per_node",
}
"""Key here -> what TRL, verl, slime, OpenRLHF, AReaL, SkyRL and prime-rl call it."""

_KEYS = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}


def hint(word: str, known: Sequence[str], prefix: str = "") -> str:
    """The key of that name in another section, or what another system calls so; else the nearest of the
    ``known``, else all of them.  Of a ``word`` with dots (``algorithm.adv_estimator``) the last part counts.
    """
    word = word.rpartition(".")[2]
    same = [key for key in settings() if key.endswith(f".{word}")]
    if found := same[0] if same else _KEYS.get(word):
        return f"; did you mean {found}?"
    return nearest(word, known, prefix) or f"; known: {', '.join(known)}"
