#!/usr/bin/env bash
# Trains on one machine of Vertex AI, with all of its TPU chips or GPUs.
#
#   jobs/vertex.sh --name=NAME --region=REGION --machine=a2-highgpu-1g \
#     --gpu=NVIDIA_TESLA_A100 --num_gpus=1 \
#     --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/prompt_tuning_jax \
#     --model_dir=gs://BUCKET/RUN [--project=PROJECT] [--service_account=EMAIL] [--spot] \
#     [--dry_run] -- --gin_file=run/prompt_tuning.gin --gin.MIXTURE_OR_TASK_NAME=sst2 …
#
# For a TPU: --machine=ct5lp-hightpu-4t --tpu_topology=2x2, without --gpu. Vertex restarts the job
# when its machine goes; the same command, as a new job, resumes too. --dry_run prints the job.
set -euo pipefail

name='' region='' machine='' gpu='' num_gpus=1 tpu_topology='' image='' model_dir='' project=''
service_account='' spot=no
. "$(dirname "$0")/arguments.sh"
parse 'name region machine image model_dir' \
  'gpu num_gpus tpu_topology project service_account spot' "$@"
check_bucket
[[ ! ($gpu && $tpu_topology) ]] || fail '--gpu and --tpu_topology exclude each other'
[[ $num_gpus =~ ^[1-9][0-9]*$ ]] || fail "--num_gpus should be a number above 0, got $num_gpus"

# In YAML, a text in single quotes has only those to be doubled.
text() {
  printf "'%s'" "${1//\'/\'\'}"
}

job() {
  local flag
  echo 'workerPoolSpecs:'
  echo '- replicaCount: 1'
  echo '  machineSpec:'
  echo "    machineType: $(text "$machine")"
  if [[ $gpu ]]; then
    echo "    acceleratorType: $(text "$gpu")"
    echo "    acceleratorCount: $num_gpus"
  fi
  [[ ! $tpu_topology ]] || echo "    tpuTopology: $(text "$tpu_topology")"
  echo '  containerSpec:'
  echo "    imageUri: $(text "$image")"
  echo '    command: [bash, /app/jobs/worker.sh]'
  echo '    args:'
  for flag in "$model_dir" "${training[@]}"; do
    echo "    - $(text "$flag")"
  done
  echo 'scheduling:'
  echo '  restartJobOnWorkerRestart: true'
  [[ $spot == no ]] || echo '  strategy: SPOT'
  [[ ! $service_account ]] || echo "serviceAccount: $(text "$service_account")"
}

config=$name.yaml
if [[ $dry_run ]]; then
  job | sed 's/^/# /'
else
  config=$(mktemp --suffix=.yaml)
  trap 'rm -f "$config"' EXIT
  job >"$config"
fi
run gcloud ai custom-jobs create "--display-name=$name" "--region=$region" \
  ${project:+"--project=$project"} "--config=$config"
