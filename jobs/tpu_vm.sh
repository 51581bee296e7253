#!/usr/bin/env bash
# Trains on a TPU VM, which is made if it is not there and made again when it is preempted.
#
#   jobs/tpu_vm.sh --name=NAME --zone=ZONE --accelerator=v5litepod-16 --model_dir=gs://BUCKET/RUN \
#     [--project=PROJECT] [--spot] [--version=RUNTIME] [--package=REQUIREMENT] [--dry_run] \
#     -- --gin_file=run/prompt_tuning.gin --gin.MIXTURE_OR_TASK_NAME=sst2 …
#
# The same command resumes. The TPU stays when the training is done, and costs until it is deleted.
# --package is what pip installs there: a name, a git+https:// address, a gs:// file will not do.
set -euo pipefail

name='' zone='' accelerator='' model_dir='' project='' version='' spot=no
package='prompt_tuning_jax[tpu,gcs]'
. "$(dirname "$0")/arguments.sh"
. "$(dirname "$0")/tpu.sh"
parse 'name zone accelerator model_dir' 'project version package spot' "$@"
describe_tpu version

delete=(gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet)

state() {
  ask gcloud compute tpus tpu-vm describe "$name" "${place[@]}" '--format=value(state)'
}

while true; do
  case $(state) in
    READY) ;;
    '') run gcloud compute tpus tpu-vm create "$name" "${place[@]}" "${kind[@]}" --quiet ;;
    PREEMPTED | TERMINATED)
      run "${delete[@]}"
      continue
      ;;
    *)
      sleep "${POLL_SECONDS:-30}"
      continue
      ;;
  esac
  status=0
  train_on_tpu || status=$?
  if [[ $dry_run || $(state) == READY ]]; then
    echo "The TPU is still there. To delete it: $(quoted "${delete[@]}")" >&2
    exit "$status"
  fi
  echo 'The TPU is gone; making another one.' >&2
done
