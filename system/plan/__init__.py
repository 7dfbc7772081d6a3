"""Plans: memory per GPU and the likely bottleneck of a configuration, before anything is started."""

from system.plan.plan import AgentWorkload, GpuPlan, plan, text

__all__ = ["AgentWorkload", "GpuPlan", "plan", "text"]
