#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster that xpk has made (pip install xpk).
#
#   jobs/xpk.sh --name=NAME --cluster=CLUSTER --zone=ZONE --tpu_type=v5litepod-16 \
#     --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/prompt_tuning_jax \
#     --model_dir=gs://BUCKET/RUN [--project=PROJECT] [--num_slices=1] [--max_restarts=100] \
#     [--dry_run] -- --gin_file=run/prompt_tuning.gin --gin.MIXTURE_OR_TASK_NAME=sst2 …
#
# jobs/Dockerfile makes the image. A pod that is evicted has two minutes to save, and is restarted
# up to --max_restarts times. The same command ends the workload of that name and resumes it.
set -euo pipefail

name='' cluster='' zone='' tpu_type='' image='' model_dir='' project='' num_slices=1 max_restarts=100
. "$(dirname "$0")/arguments.sh"
parse 'name cluster zone tpu_type image model_dir' 'project num_slices max_restarts' "$@"
check_bucket
[[ $num_slices =~ ^[1-9][0-9]*$ ]] || fail "--num_slices should be a number above 0, got $num_slices"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max_restarts should be a number, got $max_restarts"

where=("--workload=$name" "--cluster=$cluster" "--zone=$zone" ${project:+"--project=$project"})
run xpk workload delete "${where[@]}" --force || true  # there may be none
run xpk workload create "${where[@]}" "--tpu-type=$tpu_type" "--num-slices=$num_slices" \
  "--docker-image=$image" "--max-restarts=$max_restarts" --termination-grace-period-seconds=120 \
  "--command=$(quoted bash /app/jobs/worker.sh "$model_dir" "${training[@]}" --multiprocess)"
