#!/usr/bin/env bash
# GPU nodes of a SLURM cluster: submits a job that runs the same command on all of them.
#
#   bash scripts/launch/slurm.sh --nodes=2 --gpus_per_node=8 [OPTIONS] -- --preset=tiny --output_dir=runs/slurm
#
#   --nodes=N         number of nodes
#   --gpus_per_node=G
#   --per=node        one process per node; --per=gpu: one per GPU
#   --cpus=4          CPU cores per GPU
#   --time=01:00:00   time limit of the job
#   --partition=NAME --account=NAME --constraint=NAME     passed to sbatch
#   --python=PATH     default: .venv/bin/python of this checkout, with the extra cuda13
#   --script=experiments/load_balancing.py     the program to run
#   --warning=180     seconds before the time limit at which SLURM sends SIGTERM: the run saves its step and ends
#                     with status 75
#   --requeue         queue the job again after a node failure, a preemption or the time limit; it continues
#   --dry_run         print the job's script without submitting it
#   --help            print this text
#
# JAX treats each node as a slice, so --slice_parallelism=N is added. Set it yourself if NVLink connects several nodes.
# The checkout and --output_dir must be on a file system that all nodes share. srun of SLURM 22.05 and newer does not
# read the job's --cpus-per-task, so both sbatch and srun get it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

option_per=node option_cpus=4 option_time=01:00:00 option_warning=180 option_script=experiments/load_balancing.py
option_python="$root/.venv/bin/python"
read_options "nodes= gpus_per_node= per= cpus= time= warning= partition= account= constraint= python= script= requeue" "$@"
need nodes gpus_per_node
need_number nodes gpus_per_node cpus warning
if [[ ! "$option_time" =~ ^([0-9]+(:[0-5]?[0-9]){0,2}|[0-9]+-[0-9]+(:[0-5]?[0-9]){0,2}|UNLIMITED|INFINITE)$ ]]; then
  wrong "--time=$option_time: must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, e.g. 01:00:00"
fi
need_script
case "$option_per" in
  node) tasks=1 cores=$((option_cpus * option_gpus_per_node)) ;;
  gpu) tasks=$option_gpus_per_node cores=$option_cpus ;;
  *) wrong "--per=$option_per: node or gpu" ;;
esac
need_program sbatch "run this on a login node of the cluster"
if [ "$option_nodes" -gt 1 ]; then experiment_flags "--slice_parallelism=$option_nodes"; fi

# Prints the lines for those options that are given.
optional() {
  local name value
  for name in partition account constraint; do
    value="$(eval "echo \"\$option_$name\"")"
    if [ -n "$value" ]; then echo "#SBATCH --$name=$value"; fi
  done
  if [ -n "$option_requeue" ]; then
    echo "#SBATCH --requeue"
    echo "#SBATCH --open-mode=append"
  fi
}

# Prints what queues the job again when the run was asked to stop, and has saved its step.
again() {
  if [ -n "$option_requeue" ]; then
    echo 'status=$?'
    echo 'if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi'
    echo 'exit "$status"'
  fi
}

job() {
  cat <<END
#!/bin/bash
#SBATCH --job-name=moe_jax
#SBATCH --nodes=$option_nodes
#SBATCH --ntasks-per-node=$tasks
#SBATCH --cpus-per-task=$cores
#SBATCH --gpus-per-node=$option_gpus_per_node
#SBATCH --exclusive
#SBATCH --time=$option_time
#SBATCH --signal=TERM@$option_warning
#SBATCH --output=%x-%j.out
$(optional)
cd $(quoted "$root")
# Processes find each other through SLURM's variables. If one fails, the others end by themselves. srun must not end them at
# once: after status 75 of one, others may still be leaving, and srun would say 143 for those that it ends.
srun --label --kill-on-bad-exit=0 --wait=300 --cpus-per-task=$cores $(quoted "$option_python" -u "$option_script" ${arguments[@]+"${arguments[@]}"})
$(again)
END
}

if [ -n "$option_dry_run" ]; then
  job | sed '/^$/d'
else
  job | sed '/^$/d' | sbatch
fi
