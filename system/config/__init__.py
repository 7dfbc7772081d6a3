"""The configuration: one typed schema, YAML files that inherit from each other, dotted overrides.

``load("configs/quickstart.yaml", ["branching=none", "flow.staleness=0"])`` merges, in this order: the
defaults of the schema, the file's ``base:`` (recursively), the file, the overrides.  An unknown key is an
error that names the nearest known one.  A plain word given for a section or part that has a ``name`` sets
that name: ``branching=none`` is ``branching.name=none``.  A dictionary is merged into the one it inherits;
with the tag ``!replace`` it replaces it: ``task.options: !replace {}``.
"""

from system.config.by_step import at_step as at_step
from system.config.check import truncated as truncated
from system.config.check import validate as validate
from system.config.evaluation import all_rewards as all_rewards
from system.config.evaluation import scored as scored
from system.config.evaluation import set_task as set_task
from system.config.guide import GuideConfig as GuideConfig
from system.config.load import from_dict as from_dict
from system.config.load import load as load
from system.config.load import to_dict as to_dict
from system.config.load import to_yaml as to_yaml
from system.config.rule import PartConfig as PartConfig
from system.config.schema import BranchingConfig as BranchingConfig
from system.config.schema import ClusterConfig as ClusterConfig
from system.config.schema import Config as Config
from system.config.schema import EngineConfig as EngineConfig
from system.config.schema import ModelConfig as ModelConfig
from system.config.schema import RolloutConfig as RolloutConfig
from system.config.schema import SlurmConfig as SlurmConfig
from system.config.schema import TaskConfig as TaskConfig
from system.config.schema import ToolsConfig as ToolsConfig
from system.config.schema_agent import AgentConfig as AgentConfig
from system.config.schema_environment import EnvironmentConfig as EnvironmentConfig
from system.config.schema_eval import EvalConfig as EvalConfig
from system.config.schema_eval import EvalSet as EvalSet
from system.config.schema_eval import eval_sets as eval_sets
from system.config.schema_learn import LearnConfig as LearnConfig
from system.config.schema_lora import LoraConfig as LoraConfig
from system.config.schema_reward import ChosenReward as ChosenReward
from system.config.schema_reward import RewardConfig as RewardConfig
from system.config.schema_reward import rewards as rewards
from system.config.schema_sft import SftConfig as SftConfig
from system.config.schema_teacher import TeacherConfig as TeacherConfig
from system.config.settings import settings as settings
from system.config.without_effect import without_effect as without_effect
from system.config.without_effect import without_rank as without_rank
from system.errors import ConfigError as ConfigError
