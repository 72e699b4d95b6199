#!/usr/bin/env bash
# Trains on a Cloud TPU pod: every machine of the pod runs the same command.
#
#     experiments/launch/tpu_vm_pod.sh [--dry_run] create | install | train [FLAGS] | logs | stop | delete
#
#   create    the pod
#   install   this checkout's last commit, its environment, and the shared folder, on every machine
#   train     starts or resumes experiments.pretrain everywhere, in the background; FLAGS go to it
#   logs      follows the log of machine 0 (the stacks of a hang are in each machine's own)
#   stop      SIGTERM to one machine: all save and stop at the same step
#   delete    the pod; the shared folder stays
#
# --dry_run prints the commands instead of running them. Set by environment variables:
#
#   PROJECT       default: gcloud's own          ZONE          default us-east5-a
#   TPU           name, default llm-jax          ACCELERATOR   default v6e-16
#   VERSION       default: the runtime that fits ACCELERATOR
#   SPOT          1: preemptible, default 0
#   NFS           HOST:/SHARE of an NFS server (Filestore) for the runs; needed by install
#   MOUNT         where it is mounted, default /mnt/runs
#   CONFIG        recipe, default configs/llama_1b.py
#   WORKDIR       run directory, default $MOUNT/$TPU
#   MAX_RESTARTS  after a hang or a lost process, default 20
set -euo pipefail

DRY_RUN=0
if [[ ${1:-} == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
VERB=${1:-}
[[ $# -gt 0 ]] && shift

ZONE=${ZONE:-us-east5-a}
TPU=${TPU:-llm-jax}
ACCELERATOR=${ACCELERATOR:-v6e-16}
SPOT=${SPOT:-0}
MOUNT=${MOUNT:-/mnt/runs}
CONFIG=${CONFIG:-configs/llama_1b.py}
WORKDIR=${WORKDIR:-$MOUNT/$TPU}
MAX_RESTARTS=${MAX_RESTARTS:-20}
case $ACCELERATOR in # cloud.google.com/tpu/docs/runtimes
  v6e-*) DEFAULT_VERSION=v2-alpha-tpuv6e ;;
  v5p-*) DEFAULT_VERSION=v2-alpha-tpuv5 ;;
  v5litepod-*) DEFAULT_VERSION=v2-alpha-tpuv5-lite ;;
  *) DEFAULT_VERSION=tpu-ubuntu2204-base ;;
esac
VERSION=${VERSION:-$DEFAULT_VERSION}
WHERE=(--zone="$ZONE")
[[ -n ${PROJECT:-} ]] && WHERE+=(--project="$PROJECT")

run() {
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on() { # MACHINE COMMAND: a shell command on one machine, or on all of them
  run gcloud compute tpus tpu-vm ssh "$TPU" "${WHERE[@]}" --worker="$1" --command="$2"
}

case $VERB in
  create)
    SPOT_FLAG=()
    ((SPOT)) && SPOT_FLAG=(--spot)
    run gcloud compute tpus tpu-vm create "$TPU" "${WHERE[@]}" \
      --accelerator-type="$ACCELERATOR" --version="$VERSION" "${SPOT_FLAG[@]}"
    ;;
  install)
    : "${NFS:?set NFS=HOST:/SHARE, an NFS server that all machines reach}"
    CODE=$(mktemp -d)/llm_jax.tar.gz
    run git archive --format=tar.gz --output="$CODE" HEAD
    run gcloud compute tpus tpu-vm scp "$CODE" "$TPU:llm_jax.tar.gz" "${WHERE[@]}" --worker=all
    on all "set -e
sudo apt-get update -qq && sudo apt-get install -y -qq nfs-common
sudo mkdir -p $(printf %q "$MOUNT")
mountpoint -q $(printf %q "$MOUNT") || sudo mount -t nfs $(printf %q "$NFS") $(printf %q "$MOUNT")
sudo chmod a+rwx $(printf %q "$MOUNT")
mkdir -p llm_jax && tar xzf llm_jax.tar.gz -C llm_jax
python3 -m pip install --quiet --user uv  # the machines' own Python may be too old
python3 -m uv python install --quiet 3.12
make -C llm_jax install EXTRAS=tpu PYTHON=\$(python3 -m uv python find 3.12)"
    ;;
  train)
    PRETRAIN=(.venv/bin/python -m experiments.pretrain --config="$CONFIG" --workdir="$WORKDIR" "$@")
    on all "cd llm_jax && MAX_RESTARTS=$(printf %q "$MAX_RESTARTS") nohup \
bash experiments/launch/restart.sh $(printf '%q ' "${PRETRAIN[@]}")>> ../pretrain.log 2>&1 < /dev/null &"
    ;;
  logs)
    on 0 'tail -n 50 -F pretrain.log'
    ;;
  stop)
    on 0 'pkill -TERM -f "python -m experiments[.]pretrain"'
    ;;
  delete)
    run gcloud compute tpus tpu-vm delete "$TPU" "${WHERE[@]}"
    ;;
  *)
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
