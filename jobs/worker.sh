#!/usr/bin/env bash
# Runs on every machine of a job: trains, and keeps what it prints in the bucket, in MODEL_DIR/logs.
#
#   worker.sh MODEL_DIR FLAGS_OF_THE_TRAINING…
#
# SIGTERM is handed on: the training saves where it is and ends. Then this ends with status 143, not
# 0, so that whoever restarts failed jobs knows that this one is not done. $PYTHON is what runs it.
set -euo pipefail

model_dir=$1 && shift
python=${PYTHON:-python}
log=$(mktemp)
place=$model_dir/logs/$(date -u +%Y%m%dT%H%M%SZ)-$(hostname)-$$.log
stopped=''

keep_log() {
  [[ $model_dir != gs://* ]] || "$python" -c '
import sys
from prompt_tuning_jax import cloud_storage
cloud_storage.put(*sys.argv[1:])' "$log" "$place" || echo "warning: no log in $place" >&2
}

exec 3> >(trap '' TERM INT && exec tee "$log")
copier=$!
"$python" -m prompt_tuning_jax.train "$@" "--gin.MODEL_DIR=$model_dir" >&3 2>&1 3>&- &
training=$!
exec 3>&-
trap 'stopped=yes; kill -TERM "$training" 2>/dev/null' TERM INT

(while sleep "${LOG_PERIOD:-60}" >/dev/null 2>&1; do keep_log; done) &
keeper=$!

status=0
wait "$training" || status=$?
while kill -0 "$training" 2>/dev/null; do  # a signal ended the waiting, not the training
  status=0
  wait "$training" || status=$?
done
kill "$keeper" 2>/dev/null || true
wait "$copier" || true
keep_log
rm -f "$log"
[[ $stopped && $status == 0 ]] && status=143
exit "$status"
