#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster with xpk (pip install xpk), which makes a JobSet of it.
#
#     experiments/launch/gke_xpk.sh [--dry_run] create | storage | train [FLAGS] | sweep COMMANDS | list | delete
#
#   create    the cluster, with the slices
#   storage   a Filestore share that every pod mounts at MOUNT, for the runs
#   train     starts or resumes experiments.pretrain in every pod; FLAGS go to it
#   sweep     a workload WORKLOAD-N for each line N of a file that experiments.sweep --print_commands
#             has written, on slices of their own
#   list      the state of the workloads
#   delete    the workload: every pod gets SIGTERM, all save and stop at the same step
#
# --dry_run prints the commands instead of running them. Set by environment variables:
#
#   PROJECT       default: gcloud's own          ZONE          default us-east5-a
#   CLUSTER       default llm-jax                WORKLOAD      default llm-jax
#   TPU_TYPE      of a slice, default v6e-16     NUM_SLICES    default 1
#   CAPACITY      on-demand | spot | flex, default on-demand
#   BASE_IMAGE    xpk adds this folder to it, default python:3.12
#   STORAGE       name of the share, default llm-jax-runs
#   MOUNT         where it is mounted, default /mnt/runs
#   CONFIG        recipe, default configs/llama_1b.py
#   WORKDIR       run directory, default $MOUNT/$WORKLOAD
#   MAX_RESTARTS  after a hang, a lost process or a preemption, default 50
#   GRACE         seconds between SIGTERM and SIGKILL, to save in, default 300
set -euo pipefail

DRY_RUN=0
if [[ ${1:-} == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
VERB=${1:-}
[[ $# -gt 0 ]] && shift

ZONE=${ZONE:-us-east5-a}
CLUSTER=${CLUSTER:-llm-jax}
WORKLOAD=${WORKLOAD:-llm-jax}
TPU_TYPE=${TPU_TYPE:-v6e-16}
NUM_SLICES=${NUM_SLICES:-1}
CAPACITY=${CAPACITY:-on-demand}
BASE_IMAGE=${BASE_IMAGE:-python:3.12}
STORAGE=${STORAGE:-llm-jax-runs}
MOUNT=${MOUNT:-/mnt/runs}
CONFIG=${CONFIG:-configs/llama_1b.py}
WORKDIR=${WORKDIR:-$MOUNT/$WORKLOAD}
MAX_RESTARTS=${MAX_RESTARTS:-50}
GRACE=${GRACE:-300}
WHERE=(--cluster="$CLUSTER" --zone="$ZONE")
[[ -n ${PROJECT:-} ]] && WHERE+=(--project="$PROJECT")

run() {
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

workload() { # NAME COMMAND...: one in every pod
  local name=$1
  shift
  # exec: SIGTERM has to reach Python, not a shell around it.
  run xpk workload create "${WHERE[@]}" --workload="$name" --tpu-type="$TPU_TYPE" \
    --num-slices="$NUM_SLICES" --base-docker-image="$BASE_IMAGE" --script-dir=. \
    --storage="$STORAGE" --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=70 \
    --termination-grace-period-seconds="$GRACE" \
    --command="pip install --quiet -c constraints/py312.txt -e '.[tpu]' && exec $(printf '%q ' "$@")"
}

case $VERB in
  create)
    run xpk cluster create "${WHERE[@]}" --tpu-type="$TPU_TYPE" --num-slices="$NUM_SLICES" \
      "--$CAPACITY" --enable-gcpfilestore-csi-driver
    ;;
  storage)
    run xpk storage create "$STORAGE" "${WHERE[@]}" --type=gcpfilestore --auto-mount=false \
      --mount-point="$MOUNT" --readonly=false --size=2560 --tier=BASIC_SSD --vol=default
    ;;
  train)
    workload "$WORKLOAD" python -m experiments.pretrain --config="$CONFIG" --workdir="$WORKDIR" "$@"
    ;;
  sweep)
    N=0
    while IFS= read -r LINE; do
      N=$((N + 1))
      eval "WORDS=($LINE)" # as quoted for a shell by --print_commands
      workload "$WORKLOAD-$N" "${WORDS[@]}" < /dev/null
    done < "${1:?a file that experiments.sweep --print_commands has written}"
    ;;
  list)
    run xpk workload list "${WHERE[@]}"
    ;;
  delete)
    run xpk workload delete "${WHERE[@]}" --workload="$WORKLOAD"
    ;;
  *)
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
