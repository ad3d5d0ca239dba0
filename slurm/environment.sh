# shellcheck shell=bash
# What all templates share: settings of a node, checks of the first minute, survival.

# ---- Settings. A site's own values, set in the EDIT block or before sbatch, stay. ----
export PYTHONUNBUFFERED=1                 # a line of the log appears when it is printed
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"   # NCCL's errors, without its chatter; INFO shows the rings
# NCCL ends a collective that failed on another rank, instead of waiting for it for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Segments that grow: packed rows differ in length, and fixed blocks would fragment.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# srun forgets --cpus-per-task since SLURM 22.05; without it every task is bound to one core.
[[ -n "${SLURM_CPUS_PER_TASK:-}" ]] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# Threads of a task: its cores; a loader process uses one thread of its own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# Rendezvous: the first node of this job, a port that follows from its id.
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

refuse() {
  echo "moonlit: $*" >&2
  exit 1
}

# Refuse a template whose EDIT block nobody has edited, naming the line (SLURM lowers accounts).
check_site() {
  local line
  line="$(grep -n -m 1 -E '^#SBATCH --(account|partition)=EDIT' "$0" || true)"
  if [[ "${SLURM_JOB_ACCOUNT:-}" == [Ee][Dd][Ii][Tt] || "${SLURM_JOB_PARTITION:-}" == EDIT ]]; then
    refuse "the EDIT block of the template is untouched: line $line"
  fi
}

# Refuse a disk that is too full for a checkpoint: check_disk FOLDER GIGABYTES
check_disk() {
  local free_gb
  mkdir -p "$1"
  free_gb=$(($(df --output=avail -B1 "$1" | tail -n 1) / 1000000000))
  if ((free_gb < $2)); then
    refuse "$1 has $free_gb GB free, MIN_FREE_GB asks for $2: make room, or set SCRATCH or" \
      "MIN_FREE_GB in the EDIT block"
  fi
}

# Say whether the overrides set a key: is_set KEY OVERRIDES...
is_set() {
  local key="$1" word
  shift
  for word in "$@"; do
    [[ "$word" == "$key="* ]] && return 0
  done
  return 1
}

STOPPED=130                       # exit status of a run that a signal has ended after it was saved
WARNED=$((128 + $(kill -l USR1))) # and of one that was warned before it listened: nothing to save

# Run a job step; pass the warning of the time limit on to it; queue the job again when the step has
# stopped for it, unless somebody has cancelled the job. survive COMMAND...
survive() {
  local status=0 step state
  srun --kill-on-bad-exit=1 ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} "$@" &
  step=$!
  trap 'kill -USR1 "$step" 2>/dev/null || true' USR1 TERM
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do # the trap has ended the wait, not the step
    status=0
    wait "$step" || status=$?
  done
  if ((status == STOPPED || status == WARNED)); then
    state="$(scontrol show job --oneliner "$SLURM_JOB_ID")" # a line a component
    state="${state#* JobState=}"
    state="${state%% *}"
    if [[ "$state" == RUNNING ]]; then
      echo "moonlit: queueing job $SLURM_JOB_ID again (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
      scontrol requeue "$SLURM_JOB_ID"
      sleep 60 # SLURM ends this script
    fi
    echo "moonlit: job $SLURM_JOB_ID ends: $state"
  fi
  return "$status"
}
