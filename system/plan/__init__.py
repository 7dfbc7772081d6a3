"""Plans: memory per GPU and the likely bottleneck of a configuration, before anything is started."""

from system.plan.plan import GpuPlan, named_gpus, plan, text
from system.plan.search import search, table
from system.plan.supervised import supervised_plan
from system.plan.workload import AgentWorkload

__all__ = ["AgentWorkload", "GpuPlan", "named_gpus", "plan", "search", "supervised_plan", "table", "text"]
