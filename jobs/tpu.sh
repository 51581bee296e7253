# Sourced by tpu_vm.sh and queued_resource.sh: what both do with a TPU that is there.
# shellcheck shell=bash disable=SC2154

here=$(dirname "${BASH_SOURCE[0]}")

# The runtime that a kind of TPU is started with.
runtime() {
  case $accelerator in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "--accelerator should be such as v5litepod-16, v5p-8, v6e-8 or v4-8, got $accelerator" ;;
  esac
}

# Sets `place`, the flags that say where the TPU is, and `kind`, those that say what it is.
describe_tpu() {
  check_bucket
  version=${version:-$(runtime)}
  place=("--zone=$zone" ${project:+"--project=$project"})
  kind=("--accelerator-type=$accelerator" "--$1=$version")
  [[ $spot == no ]] || kind+=(--spot)
}

# Installs the package on all machines of the TPU $name, trains there, and ends with its status.
# A training that still runs there, of a connection that broke, is asked to save and stop first.
train_on_tpu() {
  local install command running="'[m]ultiprocess --gin.MODEL_DIR='"
  install="python3 -m pip install -q --user uv"
  install+=" && { [ -d venv ] || ~/.local/bin/uv venv -q --python=3.12 venv; }"
  install+=" && ~/.local/bin/uv pip install -q --python=venv/bin/python $(quoted "$package")"
  install+=" && { pkill -TERM -f $running; while pgrep -f $running >/dev/null; do sleep 5; done; }"
  command="PYTHON=venv/bin/python $(quoted bash worker.sh "$model_dir" "${training[@]}" --multiprocess)"
  run gcloud compute tpus tpu-vm scp "$here/worker.sh" "$name:" "${place[@]}" --worker=all --quiet &&
    on_all "$install" && on_all "$command"
}

on_all() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --quiet "--command=$1"
}
