#!/usr/bin/env bash
# Runs a command again for as long as it ends as a hung or broken job does, for places without a
# scheduler that would:
#
#     experiments/launch/restart.sh COMMAND...
#
# It goes on after exit code 70 (the watchdog: no progress, or another process died), 134 (jax's
# heartbeats), 137 (killed, out of memory) and 139; everything else is final: 0 finished, 1 an error
# that somebody has to mend, 143 stopped by SIGTERM and saved.
#
#   MAX_RESTARTS     default 20
#   RESTART_SECONDS  pause before the next try, default 20
set -uo pipefail

for ((restart = 0; ; restart++)); do
  "$@"
  code=$?
  case $code in
    70 | 134 | 137 | 139) ;;
    *) exit "$code" ;;
  esac
  if ((restart == ${MAX_RESTARTS:-20})); then
    echo "restart.sh: exit code $code after $restart restarts; giving up" >&2
    exit "$code"
  fi
  echo "restart.sh: exit code $code; starting again in ${RESTART_SECONDS:-20} s" >&2
  sleep "${RESTART_SECONDS:-20}"
done
