#!/usr/bin/env bash
# TPU slices of a GKE cluster, through XPK: creates a workload that runs the same command on all hosts of all slices.
#
#   bash scripts/launch/gke_xpk.sh --cluster=CLUSTER --workload=NAME --type=v5litepod-16 --image=IMAGE -- --preset=tiny
#   bash scripts/launch/gke_xpk.sh --cluster=CLUSTER --workload=NAME --delete
#
#   --cluster=NAME    an existing cluster, created with `xpk cluster create`
#   --workload=NAME   the name of this job
#   --type=TYPE       TPU type of one slice, e.g. v5litepod-16, v5p-128
#   --slices=1        number of slices; more than one is multislice and adds --slice_parallelism
#   --image=IMAGE     base image with Python 3.11 or newer; this checkout is added to it and installed at the start
#   --storage=NAME    an existing storage, created with `xpk storage`; --output_dir must be in its mount point
#   --restarts=0      how often to restart when a process dies; the run continues from the last checkpoint
#   --project=ID --zone=ZONE     default: those of gcloud
#   --script=experiments/load_balancing.py     the program to run
#   --delete          delete the workload
#   --dry_run         print the commands without running them
#   --help            print this text
#
# Written for XPK 1.16.0 (pip install xpk).
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
# If one process dies, the others end with status 1, and with 75 if a preempted one has asked all to save and stop. XPK
# does not restart for these by default.
if [ "$option_restarts" -gt 0 ]; then restart=("--max-restarts=$option_restarts" --restart-on-exit-codes=1,75); fi
run xpk workload create "${where[@]}" "--tpu-type=$option_type" "--num-slices=$option_slices" \
  "--base-docker-image=$option_image" "--script-dir=$root" ${option_storage:+"--storage=$option_storage"} \
  ${restart[@]+"${restart[@]}"} "--command=pip install --quiet -e '.[tpu]' && $experiment"
