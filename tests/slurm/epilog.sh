#!/bin/bash
# After a job, on every node: write down, and end, what it left behind.  (A site's proctrack/cgroup would end it.)
export LC_ALL=C
left=()
for place in /proc/[0-9]*; do
  environment=$(tr '\0' '\n' < "$place/environ" 2>/dev/null) || continue
  grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID" <<< "$environment" || continue
  grep -qx "SLURMD_NODENAME=$SLURMD_NODENAME" <<< "$environment" || continue
  grep -q '^SLURM_SCRIPT_CONTEXT=' <<< "$environment" && continue   # this script itself
  left+=("${place#/proc/} $(tr '\0' ' ' < "$place/cmdline" 2>/dev/null)")
  kill -KILL "${place#/proc/}" 2>/dev/null
done
[ ${#left[@]} = 0 ] || printf '%s\n' "${left[@]}" > "@STATE@/left-$SLURM_JOB_ID-$SLURMD_NODENAME-$(date +%s%N)"
exit 0
