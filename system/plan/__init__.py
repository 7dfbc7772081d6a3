"""Plans: memory per GPU and the likely bottleneck of a configuration, before anything is started."""

from system.plan.plan import Plan, Workload, plan, text

__all__ = ["Plan", "Workload", "plan", "text"]
