#!/usr/bin/env bash
# Several processes on this machine, connected as on a pod: for demonstration, and to test a run before renting a pod.
#
#   bash scripts/launch/local.sh [OPTIONS] [-- FLAGS OF THE EXPERIMENT]
#   bash scripts/launch/local.sh -- --preset=tiny --expert_parallelism=2 --output_dir=runs/two_processes
#
#   --processes=2     number of processes
#   --devices=4       virtual CPU devices per process
#   --script=experiments/load_balancing.py     the program to run
#   --python=PATH     the interpreter; by default, .venv is created first, see environment.sh
#   --dry_run         print the commands without running them
#   --help            print this text
#
# Each line of output starts with the number of its process. If one process fails, all end, with its exit status.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

option_processes=2 option_devices=4 option_script=experiments/load_balancing.py
read_options "processes= devices= script= python=" "$@"
need_number processes devices
need_script

if [ -z "$option_python" ]; then
  source "$root/scripts/environment.sh"
  if [ -z "$option_dry_run" ]; then prepare_environment; fi
  option_python="$python"
fi

if [ -n "$option_dry_run" ]; then
  port=PORT
else
  command -v "$option_python" >/dev/null 2>&1 || wrong "--python=$option_python: no such program"
  port="$("$option_python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')"
fi

cd "$root"
started=()
stop() {
  local pid
  for pid in ${started[@]+"${started[@]}"}; do kill "$pid" 2>/dev/null || true; done
}
trap stop EXIT
trap 'exit 130' INT TERM

environment=(env JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$option_devices")
for ((i = 0; i < option_processes; i++)); do
  command=("${environment[@]}" "$option_python" -u "$option_script" "--coordinator_address=127.0.0.1:$port"
    "--num_processes=$option_processes" "--process_id=$i" ${arguments[@]+"${arguments[@]}"})
  if [ -n "$option_dry_run" ]; then
    run "${command[@]}"
  else
    "${command[@]}" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    started+=($!)
  fi
done
status=0
for pid in ${started[@]+"${started[@]}"}; do
  wait "$pid" || { code=$?; if [ "$status" = 0 ]; then status=$code; fi; }
done
started=()
exit "$status"
