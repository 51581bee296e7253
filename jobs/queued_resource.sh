#!/usr/bin/env bash
# Trains on a TPU as soon as the queue gives one; when it is preempted, queues again and resumes.
#
#   jobs/queued_resource.sh --name=NAME --zone=ZONE --accelerator=v5litepod-16 \
#     --model_dir=gs://BUCKET/RUN [--project=PROJECT] [--spot] [--version=RUNTIME] \
#     [--package=REQUIREMENT] [--dry_run] \
#     -- --gin_file=run/prompt_tuning.gin --gin.MIXTURE_OR_TASK_NAME=sst2 …
#
# It stays until the training is done (run it in tmux), and deletes the TPU then. If it is stopped
# before, the same command goes on where it was. A training that fails leaves the TPU to look at.
set -euo pipefail

name='' zone='' accelerator='' model_dir='' project='' version='' spot=no
package='prompt_tuning_jax[tpu,gcs]'
. "$(dirname "$0")/arguments.sh"
. "$(dirname "$0")/tpu.sh"
parse 'name zone accelerator model_dir' 'project version package spot' "$@"
describe_tpu runtime-version

queue=(gcloud compute tpus queued-resources)
create=("${queue[@]}" create "$name" "--node-id=$name" "${place[@]}" "${kind[@]}" --quiet)
delete=("${queue[@]}" delete "$name" "${place[@]}" --force --quiet)

state() {
  ask "${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)'
}

while true; do
  case $(state) in
    '') run "${create[@]}" ;;
    SUSPENDED | FAILED) run "${delete[@]}" ;;
    ACTIVE)
      status=0
      train_on_tpu || status=$?
      if [[ $(state) == ACTIVE ]]; then
        [[ $status == 0 ]] || fail "the training failed; when looked at: $(quoted "${delete[@]}")"
        run "${delete[@]}"
        exit 0
      fi
      ;;
    *) sleep "${POLL_SECONDS:-30}" ;;
  esac
  if [[ $dry_run ]]; then  # There is nothing to wait for: what follows when the TPU has come.
    train_on_tpu
    run "${delete[@]}"
    exit 0
  fi
done
