#!/usr/bin/env bash
# TPU slices of a GKE cluster, through XPK: a workload that runs the same command on all hosts of all slices.
#
#   bash scripts/launch/gke_xpk.sh --cluster=CLUSTER --workload=NAME --type=v5litepod-16 --image=IMAGE -- --preset=tiny
#   bash scripts/launch/gke_xpk.sh --cluster=CLUSTER --workload=NAME --delete
#
#   --cluster=NAME    made before with `xpk cluster create`
#   --workload=NAME   of this job
#   --type=TYPE       TPU type of one slice, e.g. v5litepod-16, v5p-128
#   --slices=1        more than one: multislice; adds --slice_parallelism
#   --image=IMAGE     base image with Python 3.11 or newer; this checkout is added to it, and installed at the start
#   --storage=NAME    made before with `xpk storage`; where it is mounted is what --output_dir must be in
#   --restarts=0      how often to start again when a process dies; the run continues from the last checkpoint
#   --project=ID --zone=ZONE     default: gcloud's
#   --script=experiments/load_balancing.py
#   --delete          end the workload
#   --dry_run         print the commands, run nothing
#   --help
#
# Written against XPK 1.16.0 (pip install xpk).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

option_slices=1 option_restarts=0 option_script=experiments/load_balancing.py
read_options "cluster= workload= type= slices= image= storage= restarts= project= zone= script= delete" "$@"
need cluster workload
need_number slices
case "$option_restarts" in '' | *[!0-9]*) wrong "--restarts=$option_restarts: must be 0 or a positive whole number" ;; esac
need_script
need_program xpk "pip install xpk"

where=("--cluster=$option_cluster" "--workload=$option_workload"
  ${option_project:+"--project=$option_project"} ${option_zone:+"--zone=$option_zone"})
if [ -n "$option_delete" ]; then
  run xpk workload delete "${where[@]}"
  exit
fi

need type image
if [ "$option_slices" -gt 1 ]; then experiment_flags "--slice_parallelism=$option_slices"; fi
experiment="$(quoted python3 -u "$option_script" ${arguments[@]+"${arguments[@]}"})"
restart=()
# A process whose partner died ends with status 1, which XPK does not start again by itself.
if [ "$option_restarts" -gt 0 ]; then restart=("--max-restarts=$option_restarts" --restart-on-exit-codes=1); fi
run xpk workload create "${where[@]}" "--tpu-type=$option_type" "--num-slices=$option_slices" \
  "--base-docker-image=$option_image" "--script-dir=$root" ${option_storage:+"--storage=$option_storage"} \
  ${restart[@]+"${restart[@]}"} "--command=pip install --quiet -e '.[tpu]' && $experiment"
