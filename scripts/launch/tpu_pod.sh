#!/usr/bin/env bash
# A TPU pod slice, or several, through gcloud: creates a queued resource and runs the same command on all its hosts.
#
#   bash scripts/launch/tpu_pod.sh --action=create  --name=NAME --zone=ZONE --type=v5litepod-16
#   bash scripts/launch/tpu_pod.sh --action=install --name=NAME --zone=ZONE
#   bash scripts/launch/tpu_pod.sh --action=run     --name=NAME --zone=ZONE -- --preset=tiny --output_dir=/mnt/shared/run
#   bash scripts/launch/tpu_pod.sh --action=delete  --name=NAME --zone=ZONE
#
#   --action=create   request the slices, and wait until they are ready
#            install  copy the last commit of this checkout to all hosts and install it there
#            run      start the experiment on all hosts; it continues there after Ctrl-C
#            stop     stop what `run` started; it saves its step first
#            delete   delete the slices
#   --name=NAME       name of the queued resource
#   --zone=ZONE       e.g. us-west4-a
#   --project=ID      default: that of gcloud
#   --type=TYPE       accelerator type of one slice, e.g. v5litepod-16, v5p-128, v6e-64
#   --runtime=VERSION software version of the hosts; default: Google's for JAX on that type
#   --slices=1        number of slices; more than one is multislice, and `run` then adds --slice_parallelism
#   --spot            use spot capacity, which may be preempted; the same `run` continues from the last checkpoint
#   --script=experiments/load_balancing.py     the program to run
#   --dry_run         print the commands without running them
#   --help            print this text
#
# --output_dir must be a folder that all hosts share (Filestore, or a bucket mounted with gcsfuse). Only `create` and
# `run` need --slices, with the same number. Written for Google Cloud SDK 528.0.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

option_slices=1 option_script=experiments/load_balancing.py
read_options "action= name= zone= project= type= runtime= slices= spot script=" "$@"
need action name zone
need_number slices
need_script
need_program gcloud "see https://cloud.google.com/sdk/docs/install"

resource=(gcloud compute tpus queued-resources)
where=("--zone=$option_zone" ${option_project:+"--project=$option_project"})
everywhere=("${where[@]}" --node=all --worker=all)

default_runtime() {
  case "$1" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) wrong "--type=$1: not known here; give its software version too, --runtime=VERSION" ;;
  esac
}

create() {
  need type
  if [ -z "$option_runtime" ]; then option_runtime="$(default_runtime "$option_type")" || exit 2; fi
  local nodes=("--node-id=$option_name")
  if [ "$option_slices" -gt 1 ]; then nodes=("--node-count=$option_slices" "--node-prefix=$option_name"); fi
  run "${resource[@]}" create "$option_name" "${where[@]}" "--accelerator-type=$option_type" \
    "--runtime-version=$option_runtime" "${nodes[@]}" ${option_spot:+--spot}
  local describe=("${resource[@]}" describe "$option_name" "${where[@]}" '--format=value(state.state)') state=""
  if [ -n "$option_dry_run" ]; then
    run "${describe[@]}"
    return
  fi
  while [ "$state" != ACTIVE ]; do
    state="$("${describe[@]}")"
    case "$state" in FAILED | SUSPENDED) wrong "the queued resource $option_name is $state; see gcloud compute tpus queued-resources describe" ;; esac
    echo "[moe_jax] $option_name: $state"
    if [ "$state" != ACTIVE ]; then sleep 30; fi
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/moe_jax.tar.gz"
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  run "${resource[@]}" scp "$archive" "$option_name:moe_jax.tar.gz" "${everywhere[@]}"
  run "${resource[@]}" ssh "$option_name" "${everywhere[@]}" \
    '--command=mkdir -p moe_jax && tar -xzf moe_jax.tar.gz -C moe_jax && cd moe_jax && bash -c "source scripts/environment.sh && prepare_environment tpu"'
}

# The process continues if the connection is lost. Its output is in moe_jax/run.log on each host.
start() {
  if [ "$option_slices" -gt 1 ]; then experiment_flags "--slice_parallelism=$option_slices"; fi
  local experiment
  experiment="$(quoted .venv/bin/python -u "$option_script" ${arguments[@]+"${arguments[@]}"})"
  run "${resource[@]}" ssh "$option_name" "${everywhere[@]}" \
    "--command=cd moe_jax && (nohup $experiment > run.log 2>&1 & echo \$! > run.pid) && tail --pid=\$(cat run.pid) -n +1 -F run.log"
}

case "$option_action" in
  create) create ;;
  install) install ;;
  run) start ;;
  stop) run "${resource[@]}" ssh "$option_name" "${everywhere[@]}" '--command=kill $(cat moe_jax/run.pid)' ;;
  delete) run "${resource[@]}" delete "$option_name" "${where[@]}" --force --quiet ;;
  *) wrong "--action=$option_action: create, install, run, stop or delete" ;;
esac
