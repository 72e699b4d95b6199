#!/usr/bin/env bash
# The whole chain on one machine: a base model, its assistant, a reward model, direct optimisation,
# and all of it compared with best-of-n.
#
#     experiments/launch/preferences.sh                          # offline, from nothing; 20 minutes
#     BASE=SmolLM2-135M-Instruct.gguf SFT= PAIRS=hh-harmless.jsonl.gz REWARD=configs/reward_hh.py \
#       DPO=configs/dpo_smollm2.py experiments/launch/preferences.sh
#
# The same command again goes on where it was: runs resume, and what is finished is left alone.
#
#   OUT      folder of the runs, default runs/preferences
#   BASE     a model to start from; default: one is trained with PRETRAIN
#   PRETRAIN, SFT, REWARD, DPO   recipes; SFT= (empty) leaves that step out
#   CHATS    conversations for SFT; default: the recipe's own
#   PAIRS    preferences; default: the recipes' own, and their prompts
#   JUDGED   held-out prompts that are answered at the end, default 100; N the best of how many,
#            default 16
#   TOKENS   of an answer at most, default 64
#   PRETRAIN_FLAGS, SFT_FLAGS, REWARD_FLAGS, DPO_FLAGS   further flags, separated by spaces
#   PYTHON   default python
set -euo pipefail

OUT=${OUT:-runs/preferences}
PYTHON=${PYTHON:-python}
PRETRAIN=${PRETRAIN:-configs/quickstart.py}
SFT=${SFT-configs/sft_embedded.py}
REWARD=${REWARD:-configs/reward_embedded.py}
DPO=${DPO:-configs/dpo_embedded.py}
PAIRS=${PAIRS:-}

run() {
  echo "+ $*" >&2
  if [[ ${DRY_RUN:-} == "" ]]; then "$@"; fi
}

DRY_RUN=
if [[ ${1:-} == --dry_run ]]; then DRY_RUN=1; run() { printf '%q ' "$@"; echo; }; fi
# Flags are split at spaces on purpose.
# shellcheck disable=SC2086
{
  base=${BASE:-}
  if [[ $base == "" ]]; then
    base=$OUT/base
    run "$PYTHON" -m experiments.pretrain --config="$PRETRAIN" --workdir="$base" ${PRETRAIN_FLAGS:-}
  fi
  policy=$base
  if [[ $SFT != "" ]]; then
    policy=$OUT/sft
    run "$PYTHON" -m experiments.sft --config="$SFT" --init_from="$base" --workdir="$policy" \
      ${CHATS:+--input="$CHATS"} ${SFT_FLAGS:-}
  fi
  run "$PYTHON" -m experiments.reward --config="$REWARD" --init_from="$policy" \
    --workdir="$OUT/reward" ${PAIRS:+--input="$PAIRS"} ${REWARD_FLAGS:-}
  run "$PYTHON" -m experiments.dpo --config="$DPO" --init_from="$policy" --workdir="$OUT/dpo" \
    ${PAIRS:+--input="$PAIRS"} ${DPO_FLAGS:-}
  if [[ -e $OUT/best_of_n/results.json ]]; then
    echo "$OUT/best_of_n is there already" >&2
  else
    run "$PYTHON" -m experiments.best_of_n --checkpoint="$policy" --judge="$OUT/reward" \
      --against="$OUT/dpo" --held_out_of="$OUT/dpo" --prompts="${JUDGED:-100}" \
      --n="${N:-16}" --max_new_tokens="${TOKENS:-64}" --output="$OUT/best_of_n"
  fi
}
