# The one library of every job: Ray over an allocation, one driver, health gates, signals, requeue, teardown.
#
# `batch` runs on the first node, in the batch script; it starts `task` once on every node by one srun.  Task 0 is
# Ray's head and the driver (`espalier train`, or `sft`, `--resume $RUN`), the others are Ray's workers.  They talk through files
# of the run directory, the one path that all nodes share:
#
#   attempts.jsonl             one line when an attempt starts, one when it ends: exit code, cause, what came next
#   attempts/NNN/control       "start" | "head HOST:PORT" | "stop" | "done CODE"; always rewritten in place, since
#                              opening a file makes NFS look for its newest contents
#   attempts/NNN/logs/*.log    node-<rank>.log, driver.log, and one file per actor
#   attempts/NNN/token         what Ray's processes prove their membership with
#
# Settings are variables that the job script sets: RUN JOB GPUS TIME_SIGNAL_S MAX_RESTARTS MAX_FAILURES REQUEUE
# JOIN_S WAIT_S SCRATCH SRUN_OPTIONS LAUNCH.

readonly STOPPED=3 TEMPFAIL=75     # the driver's exit codes that may be resumed (system/errors.py)
readonly GRACE_S=60                # for the other tasks to end after the driver has

say() { printf '%s [%s] %s\n' "$(date +%FT%T)" "${SLURMD_NODENAME:-batch}" "$*"; }

plain() { tr -d '\042\134\012' | tr -c '[:print:]' ' ' | cut -c1-400; }   # fit to stand in a JSON string

nap() { read -rt "$1" <> <(:) || true; }   # sleeps without a process that could outlive the job

control() { cat "$ATTEMPT_DIR/control" 2>/dev/null; }

tell() { printf '%s\n' "$1" > "$ATTEMPT_DIR/control"; }

kind() { if [ -e "$RUN/sft.json" ]; then echo sft; else echo train; fi; }   # system/observe/rundir.py

trained_steps() {   # of all attempts together, those that were made twice included
  if [ "$(kind)" = sft ]; then grep -c '"sft/loss": ' "$RUN/metrics.jsonl" 2>/dev/null || true
  else grep -c '"event": *"trained"' "$RUN/ledger.jsonl" 2>/dev/null || true
  fi
}

# ---------------------------------------------------------------- the batch script

batch() {
  export RUN ATTEMPT ATTEMPT_DIR
  STOP="" CHILD="" LATE="" ALARM=""
  if [ -e "$JOB/cancelled" ]; then say "cancelled before it started"; exit 0; fi
  ATTEMPT=0
  mkdir -p "$RUN/attempts"
  until mkdir "$RUN/attempts/$(printf %03d "$ATTEMPT")" 2>/dev/null; do
    ATTEMPT=$((ATTEMPT + 1))
    [ "$ATTEMPT" -lt 1000 ] || { say "cannot make a directory in $RUN/attempts"; exit 1; }
  done
  ATTEMPT_DIR=$RUN/attempts/$(printf %03d "$ATTEMPT")
  mkdir "$ATTEMPT_DIR/logs"
  tell start
  (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$ATTEMPT_DIR/token")
  STEPS_BEFORE=$(trained_steps)
  local job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  printf '{"event": "start", "attempt": %d, "job": "%s", "restart": %d, "nodes": "%s", "trained": %d, "time": %d}\n' \
    "$ATTEMPT" "$job" "${SLURM_RESTART_COUNT:-0}" "$(all_nodes)" "${STEPS_BEFORE:-0}" "$(date +%s)" \
    >> "$RUN/attempts.jsonl"
  say "attempt $ATTEMPT of $RUN on $(all_nodes)"

  trap 'on_signal "the time limit or a preemption is near"' USR1
  trap 'on_signal "the job was told to end"' TERM
  trap 'STOP="$STOP; no checkpoint in time"; finish' ALRM
  trap 'rm -f "$ATTEMPT_DIR/token"' EXIT

  # shellcheck disable=SC2086 # options are words
  srun $SRUN_OPTIONS --kill-on-bad-exit=0 --wait="$WAIT_S" --label --output="$ATTEMPT_DIR/logs/node-%t.log" \
    "${LAUNCH[@]}" bash "$JOB/job.sh" task &
  CHILD=$!
  late_end "$CHILD" &
  LATE=$!
  while kill -0 "$CHILD" 2>/dev/null; do wait "$CHILD"; done    # a trap interrupts the wait
  finish
}

all_nodes() {   # SLURM_JOB_NODELIST has the first component of a heterogeneous job only
  local group nodes=${SLURM_JOB_NODELIST:-} name
  for ((group = 1; group < ${SLURM_HET_SIZE:-1}; group++)); do name=SLURM_JOB_NODELIST_HET_GROUP_$group; nodes+=",${!name}"; done
  echo "$nodes"
}

# Let the driver checkpoint.  URG, because it reaches every process of the step and only task 0's shell minds it.
on_signal() {
  if [ -n "$STOP" ] || [[ $(control) == done* ]]; then return 0; fi
  STOP=$1
  if [ -e "$JOB/cancelled" ]; then STOP="espalier cancel"; fi
  say "$STOP: asking the driver for a checkpoint"
  tell stop
  scancel --quiet --signal=URG "$SLURM_JOB_ID.0" || true
  local patience=$((TIME_SIGNAL_S > 60 ? TIME_SIGNAL_S - 30 : TIME_SIGNAL_S / 2 + 1))
  (nap "$patience"; kill -ALRM $$) 2>/dev/null &
  ALARM=$!
}

# srun waits for tasks of a node that is gone until Slurm knows that it is, which may take many minutes.
late_end() {
  until [[ $(control) == done* ]]; do nap 2; kill -0 "$1" 2>/dev/null || return 0; done
  for ((i = 0; i < GRACE_S + 30; i++)); do nap 1; kill -0 "$1" 2>/dev/null || return 0; done
  say "srun did not end: going on without it"
  kill -KILL "$1"
}

cause() {   # of the attempt's end, from whoever named one
  local word
  word=$(cat "$ATTEMPT_DIR"/cause-* 2>/dev/null | head -n 1)
  [ -n "$word" ] || word=$(grep -h '^espalier: ' "$ATTEMPT_DIR/logs/driver.log" 2>/dev/null | grep -v 'the run failed' | tail -n 1)
  echo "${word#espalier: }"
}

# How the attempt ended, and what comes next: done, requeue or an error.
finish() {
  trap '' USR1 TERM ALRM
  # shellcheck disable=SC2086 # one of them may be missing
  kill $LATE $ALARM 2>/dev/null
  local code why next trained failures
  code=$(control | sed -n 's/^done //p')
  why=$(cause)
  trained=$(($(trained_steps) - STEPS_BEFORE))
  failures=$(cat "$RUN/attempts/failures" 2>/dev/null || echo 0)
  if [ -z "$code" ]; then code=$TEMPFAIL; why=${why:-"the driver ended without a word (see $ATTEMPT_DIR/logs)"}; fi
  if [ -n "$STOP" ] && [ "$code" != 0 ] && [ "$code" != "$TEMPFAIL" ]; then code=$STOPPED; why=$STOP; fi
  if [ "$code" = "$TEMPFAIL" ] && [ "$trained" -le 0 ]; then failures=$((failures + 1)); else failures=0; fi
  echo "$failures" > "$RUN/attempts/failures"
  next=$(verdict "$code" "$failures")
  printf '{"event": "end", "attempt": %d, "exit": %d, "cause": "%s", "trained": %d, "next": "%s", "time": %d}\n' \
    "$ATTEMPT" "$code" "$(plain <<< "$why")" "$((STEPS_BEFORE + trained))" "$next" "$(date +%s)" >> "$RUN/attempts.jsonl"
  say "attempt $ATTEMPT ended with $code${why:+ ($why)}: $next"
  rm -f "$ATTEMPT_DIR/token"
  if [ "$next" = requeue ]; then
    scontrol requeue "$SLURM_JOB_ID" && nap 300       # Slurm ends this script when the requeue takes effect
    say "the requeue failed"
  elif [ "$next" = cancelled ]; then
    scancel --quiet "$SLURM_JOB_ID" && nap 60
  fi
  trap - EXIT
  exit "$code"
}

verdict() {   # CODE FAILURES
  case $1 in
    0) echo finished; return;;
    "$STOPPED" | "$TEMPFAIL") ;;
    *) echo failed; return;;
  esac
  if [ -e "$JOB/cancelled" ]; then echo cancelled
  elif [ "$REQUEUE" != true ]; then echo "stopped, slurm.requeue is off"
  elif [ "$1" = "$TEMPFAIL" ] && [ "$2" -gt "$MAX_FAILURES" ]; then echo "failed, $2 times in a row without a step"
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then echo "stopped, slurm.max_restarts reached"
  elif ! scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null | grep -q 'JobState=RUNNING'; then echo "left to Slurm"
  else echo requeue
  fi
}

# ---------------------------------------------------------------- one task per node

task() {
  RANK=$SLURM_PROCID RAY_PID="" DRIVER=""
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$ATTEMPT_DIR/token
  export RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_DISABLE_IMPORT_WARNING=1
  export ESPALIER_LOGS=$ATTEMPT_DIR/logs PYTHONUNBUFFERED=1
  export ESPALIER_TASK=$SLURM_JOB_ID.$ATTEMPT.$RANK   # by which teardown knows what this task has started
  export SPT_NOENV=1                                  # Ray's process titles leave the environment readable
  unset ROCR_VISIBLE_DEVICES RAY_ADDRESS
  ulimit -Sn "$(ulimit -Hn)" 2>/dev/null || true
  TEMP=$SCRATCH/esp-$(id -u)-$SLURM_JOB_ID-$ATTEMPT-$RANK
  trap teardown EXIT
  trap 'STOPPING=1' URG
  trap ':' TERM
  ADDRESS=$(getent ahostsv4 "$SLURMD_NODENAME" | awk 'NR==1 {print $1}')
  ADDRESS=${ADDRESS:-$(scontrol show node -o "$SLURMD_NODENAME" 2>/dev/null | sed -n 's/.* NodeAddr=\([0-9.]*\) .*/\1/p')}
  health
  if [ "$RANK" = 0 ]; then head_task; else worker_task; fi
}

give_up() {   # CAUSE: end this task, and with it, after GRACE_S, the step
  say "$1"
  printf '%s: %s\n' "$SLURMD_NODENAME" "$1" > "$ATTEMPT_DIR/cause-$RANK"
  [ "$RANK" != 0 ] || tell "done $TEMPFAIL"
  exit 11
}

# Is this node fit to start?  Whatever is wrong is named before Ray or a model is loaded.
health() {
  local found
  command -v python > /dev/null || give_up "no python in PATH: set slurm.venv, slurm.setup or slurm.image"
  [ -n "$ADDRESS" ] || give_up "its name has no IPv4 address that getent or scontrol knows"
  touch "$ATTEMPT_DIR/logs/node-$RANK.alive" 2>/dev/null || give_up "cannot write to $ATTEMPT_DIR: the run directory must be shared by all nodes"
  rm -f "$ATTEMPT_DIR/logs/node-$RANK.alive"
  mkdir -p "$TEMP" 2>/dev/null || give_up "cannot write to slurm.scratch=$SCRATCH"
  if [ "$GPUS" -gt 0 ]; then
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    [ "${found:-0}" -ge "$GPUS" ] || give_up "nvidia-smi shows ${found:-0} GPUs, cluster.gpus_per_node=$GPUS"
  fi
  found=$(df -Pk /dev/shm 2>/dev/null | awk 'NR==2 {print $4}')
  [ "${found:-0}" -ge 500000 ] || give_up "/dev/shm has ${found:-0} kB free: Ray's object store needs at least 500000"
}

# `--block` keeps Ray's daemons below one process, which ends when one of them does.  Actors ask for no CPUs, so one is
# enough; more would only start idle workers.
start_ray() {
  ray start "$@" --block --node-ip-address="$ADDRESS" --temp-dir="$TEMP" --num-cpus=1 --num-gpus="$GPUS" \
    --labels="espalier-rank=$RANK,espalier-name=$SLURMD_NODENAME" --disable-usage-stats > "$ATTEMPT_DIR/logs/ray-$RANK.log" 2>&1 &
  RAY_PID=$!
  for ((tenth = 0; tenth < JOIN_S * 10; tenth++)); do
    if grep -qs 'Ray runtime started' "$ATTEMPT_DIR/logs/ray-$RANK.log"; then return 0; fi
    kill -0 "$RAY_PID" 2>/dev/null || return 1
    nap 0.1
  done
  return 1
}

head_task() {
  local port try code=0
  for try in 0 1 2 3; do   # the port follows from the job, so that jobs on one node differ; some may be taken
    port=$((20000 + (SLURM_JOB_ID * 4 + try) % 10000))
    if start_ray --head --port="$port" --include-dashboard=false; then break; fi
    say "Ray's head did not start on port $port"; port=""
  done
  [ -n "$port" ] || give_up "Ray's head did not start (see ray-0.log)"
  if [[ $(control) == stop ]]; then STOPPING=1; else tell "head $ADDRESS:$port"; fi
  say "Ray's head is at $ADDRESS:$port; starting the driver"
  RAY_ADDRESS=$ADDRESS:$port python -m actors.cli.main "$(kind)" --resume "$RUN" > "$ATTEMPT_DIR/logs/driver.log" 2>&1 &
  DRIVER=$!
  while kill -0 "$DRIVER" 2>/dev/null; do
    if [ -n "${STOPPING:-}" ] && [[ $(control) == stop ]]; then
      STOPPING=""
      say "passing the request to stop on to the driver"
      kill -TERM "$DRIVER" 2>/dev/null
    fi
    wait "$DRIVER"; code=$?
  done
  say "the driver ended with $code"
  if [ "$code" = 1 ]; then   # Ray ends a driver whose raylet has gone in just this way, and that is no fault of the run
    nap 3
    kill -0 "$RAY_PID" 2>/dev/null || { code=$TEMPFAIL; echo "Ray ended on the first node" > "$ATTEMPT_DIR/cause-$RANK"; }
  fi
  tell "done $code"
  exit 0
}

worker_task() {
  local word
  for ((tenth = 0; tenth < JOIN_S * 5; tenth++)); do
    word=$(control)
    case $word in head*) break;; done*) exit 0;; esac
    nap 0.2
  done
  [[ $word == head* ]] || give_up "Ray's head was not there within ${JOIN_S} s"
  for ((try = 0; try < 3; try++)); do
    if start_ray --address="${word#head }"; then break; fi
    [ "$try" -lt 2 ] || give_up "Ray did not join ${word#head } (see ray-$RANK.log)"
  done
  say "joined ${word#head }"
  until [[ $(control) == done* ]]; do
    kill -0 "$RAY_PID" 2>/dev/null || { say "Ray ended on this node"; exit 13; }   # the driver sees the loss, too
    nap 0.5
  done
}

# Nothing that this task has started outlives it: Ray's own end, then TERM, then KILL, by the mark in the environment.
teardown() {
  trap '' TERM URG EXIT
  [ -z "$RAY_PID" ] || kill -TERM "$RAY_PID" 2>/dev/null
  for signal in 0 0 0 TERM 0 0 0 0 KILL; do
    # shellcheck disable=SC2046 # one word per process
    set -- $(mine)
    [ "$#" -gt 0 ] || break
    [ "$signal" = 0 ] || kill -s "$signal" "$@" 2>/dev/null
    nap 0.5
  done
  rm -rf "$TEMP"
}

mine() {   # processes with this task's mark, but for this shell and its own children
  local place pid
  for place in /proc/[0-9]*; do
    pid=${place#/proc/}
    if [ "$pid" = $$ ] || [ "$pid" = "$BASHPID" ]; then continue; fi
    grep -qsz "^ESPALIER_TASK=$ESPALIER_TASK\$" "$place/environ" && echo "$pid"
  done
}
