#!/usr/bin/env bash
# Trains on GPUs under Slurm: queues slurm.sbatch, a process for each GPU.
#
#   jobs/slurm.sh --name=NAME --nodes=2 --gpus_per_node=8 --time=24:00:00 \
#     --model_dir=gs://BUCKET/RUN [--partition=PARTITION] [--account=ACCOUNT] [--python=PYTHON] \
#     [--dry_run] -- --gin_file=run/prompt_tuning.gin --gin.MIXTURE_OR_TASK_NAME=sst2 …
#
# --model_dir may also be a folder that all nodes see. Two minutes before its time is over, and when
# it is preempted, the job saves, goes back into the queue, and resumes. The same command resumes too;
# of one name, one job runs at a time. What it prints is in NAME-JOB.log.
set -euo pipefail

name='' nodes=1 gpus_per_node='' time='' model_dir='' partition='' account='' python=python
. "$(dirname "$0")/arguments.sh"
parse 'name gpus_per_node time model_dir' 'nodes partition account python' "$@"
[[ $model_dir == /* ]] || check_bucket
[[ $python != *,* ]] || fail "--python may have no comma, which ends a value for Slurm, got $python"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes should be a number above 0, got $nodes"
[[ $gpus_per_node =~ ^[1-9][0-9]*$ ]] ||
  fail "--gpus_per_node should be a number above 0, got $gpus_per_node"

run sbatch "--job-name=$name" "--nodes=$nodes" "--gpus-per-node=$gpus_per_node" \
  "--ntasks-per-node=$gpus_per_node" "--time=$time" "--output=$name-%j.log" --open-mode=append \
  --requeue --signal=B:TERM@120 --dependency=singleton \
  ${partition:+"--partition=$partition"} ${account:+"--account=$account"} \
  "--export=ALL,PYTHON=$python" "$(dirname "$0")/slurm.sbatch" "$(dirname "$0")/worker.sh" \
  "$model_dir" "${training[@]}" --multiprocess
