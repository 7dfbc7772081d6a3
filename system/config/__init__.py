"""The configuration: one typed schema, YAML files that inherit from each other, dotted overrides.

``load("configs/quickstart.yaml", ["branching=none", "flow.staleness=0"])`` merges, in this order: the
defaults of the schema, the file's ``base:`` (recursively), the file, the overrides.  An unknown key is an
error that names the nearest known one.  A plain word given for a section or part that has a ``name`` sets
that name: ``branching=none`` is ``branching.name=none``.  A dictionary is merged into the one it inherits;
with the tag ``!replace`` it replaces it: ``task.options: !replace {}``.
"""

from system.config.check import validate
from system.config.load import from_dict, load, to_dict, to_yaml
from system.config.schema import (
    BranchingConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    EngineConfig,
    EvalConfig,
    FlowConfig,
    LearnConfig,
    ModelConfig,
    ObserveConfig,
    PartConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SlurmConfig,
    TaskConfig,
    ToolsConfig,
    WarmStartConfig,
    settings,
)
from system.errors import ConfigError

__all__ = [
    "BranchingConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "EngineConfig",
    "EvalConfig",
    "FlowConfig",
    "LearnConfig",
    "ModelConfig",
    "ObserveConfig",
    "PartConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SlurmConfig",
    "TaskConfig",
    "ToolsConfig",
    "WarmStartConfig",
    "from_dict",
    "load",
    "settings",
    "to_dict",
    "to_yaml",
    "validate",
]
