"""The launchers print the exact commands that they would run, and one line for invalid input."""

import os
import pathlib
import shlex
import shutil
import stat
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCHERS = ("local", "tpu_pod", "gke_xpk", "slurm")
POD = "--name=pod --zone=z"
GCLOUD = "gcloud compute tpus queued-resources"


def _launch(name: str, arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
  env = os.environ | ({"PATH": path} if path else {})
  env.pop("XLA_FLAGS", None)
  command = ["bash", f"scripts/launch/{name}.sh", *shlex.split(arguments)]
  return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)


def _dry(name: str, arguments: str) -> str:
  ended = _launch(name, f"--dry_run {arguments}")
  assert ended.returncode == 0 and ended.stderr == "", ended.stderr
  return ended.stdout.replace(str(ROOT), "ROOT")


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(path):
  assert subprocess.run(["bash", "-n", path], capture_output=True, timeout=60).stderr == b""


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_is_the_head_of_the_file_and_names_every_option(name):
  shown = _launch(name, "--help").stdout
  assert shown.startswith(("Several", "A TPU", "TPU slices", "GPU nodes")) and "set -e" not in shown
  unknown = _launch(name, "--no_such_option").stderr
  for option in unknown.partition("known: ")[2].split():
    assert option in shown, option


def test_local():
  command = "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 python3 -u experiments/routers.py"
  flags = "--coordinator_address=127.0.0.1:PORT --num_processes=3"
  options = "--processes=3 --devices=2 --python=python3 --script=experiments/routers.py"
  assert _dry("local", f"{options} -- --preset=tiny '--output_dir=a b'").splitlines() == [
    f"{command} {flags} --process_id={i} --preset=tiny '--output_dir=a b'" for i in range(3)
  ]


def test_tpu_pod_creates_one_slice_or_several():
  common = "--zone=z --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5"
  describe = f"{GCLOUD} describe pod --zone=z '--format=value(state.state)'"
  cases = ("", "--node-id=pod"), ("--slices=4 --spot", "--node-count=4 --node-prefix=pod --spot")
  for flags, options in cases:
    shown = _dry("tpu_pod", f"--action=create {POD} --type=v5p-128 {flags}")
    assert shown.splitlines() == [f"{GCLOUD} create pod {common} {options}", describe]


def test_tpu_pod_runs_the_same_command_on_all_hosts_of_all_slices():
  shown = _dry("tpu_pod", f"--action=run {POD} --slices=2 -- --preset=tiny --methods=none,a:1")
  assert shown == (
    f"{GCLOUD} ssh pod --zone=z --node=all --worker=all '--command=cd moe_jax && (nohup .venv/bin/python -u "
    "experiments/load_balancing.py --slice_parallelism=2 --preset=tiny --methods=none,a:1 > run.log 2>&1 & echo $! > "
    "run.pid) && tail --pid=$(cat run.pid) -n +1 -F run.log'\n"
  )
  deleted = _dry("tpu_pod", f"--action=delete {POD} --project=p")
  assert deleted == f"{GCLOUD} delete pod --zone=z --project=p --force --quiet\n"
  assert f"{GCLOUD} scp " in _dry("tpu_pod", f"--action=install {POD}")


def test_gke_xpk():
  workload = "--cluster=c --workload=w"
  shown = _dry("gke_xpk", f"{workload} --type=v5p-128 --slices=2 --image=i --restarts=3 -- --seeds=1")
  assert shown == (
    "xpk workload create --cluster=c --workload=w --tpu-type=v5p-128 --num-slices=2 --base-docker-image=i "
    "--script-dir=ROOT --max-restarts=3 --restart-on-exit-codes=1,75 '--command=pip install --quiet -e '\\''.[tpu]'\\'' && "
    "python3 -u experiments/load_balancing.py --slice_parallelism=2 --seeds=1'\n"
  )
  assert _dry("gke_xpk", f"{workload} --delete") == f"xpk workload delete {workload}\n"


@pytest.mark.parametrize(("per", "tasks", "cores"), [("node", 1, 16), ("gpu", 8, 2)])
def test_slurm(per, tasks, cores):
  options = f"--nodes=2 --gpus_per_node=8 --per={per} --cpus=2 --python=py --account=me"
  shown = _dry("slurm", f"{options} -- --a=1")
  lines = shown.splitlines()
  assert lines[0] == "#!/bin/bash" and "#SBATCH --account=me" in lines
  sizes = "--nodes=2", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cores}"
  assert {f"#SBATCH {size}" for size in sizes} <= set(lines)
  assert lines[-1] == (
    f"srun --label --kill-on-bad-exit=0 --wait=300 --cpus-per-task={cores} py -u experiments/load_balancing.py "
    "--slice_parallelism=2 --a=1"
  )
  assert "partition" not in shown


def test_slurm_asks_for_a_signal_and_queues_a_stopped_job_again():
  """The job's script with stand-ins for srun and scontrol: again after status 75, which says that a step is saved."""
  shown = _dry("slurm", "--nodes=1 --gpus_per_node=8 --requeue --warning=90 --time=2-00:00:00")
  assert "#SBATCH --signal=TERM@90" in shown and "#SBATCH --time=2-00:00:00" in shown
  script = shown.replace("cd ROOT", "").replace("srun ", "ends_with $1 # ")
  script = 'ends_with() { return "$1"; }\nscontrol() { echo "$@"; }\nSLURM_JOB_ID=7\n' + script
  for status, said in ((75, "requeue 7\n"), (1, ""), (0, "")):
    ended = subprocess.run(
      ["bash", "-c", script, "job", str(status)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (status, said)


SRUN = """#!/bin/bash
# Stands for srun with two tasks, of which the first ends at once and the second when TASK_SECONDS are over.
kill_others=1
for word in "$@"; do case "$word" in --kill-on-bad-exit=*) kill_others="${word#*=}" ;; esac; done
(exec 2>&-; sleep "$TASK_SECONDS"; exit "$TASK_STATUS") & second=$!
if [ "$FIRST_STATUS" -ne 0 ] && [ "$kill_others" -eq 1 ]; then kill -TERM "$second"; fi
wait "$second"; status=$?
[ "$status" -gt "$FIRST_STATUS" ] || status="$FIRST_STATUS"  # srun's is the highest
exit "$status"
"""


@pytest.mark.parametrize(
  ("first", "second", "status", "said"),
  [(75, 75, 75, "requeue 7\n"), (1, 1, 1, ""), (0, 0, 0, ""), (75, 134, 134, "")],
)
def test_slurm_does_not_end_a_task_that_is_still_leaving(tmp_path, first, second, status, said):
  """One task has saved and ended with 75 while another still leaves; the job is queued again, and only then."""
  for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@"\n')):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  script = _launch("slurm", "--dry_run --nodes=1 --gpus_per_node=8 --requeue").stdout
  own = {"FIRST_STATUS": str(first), "TASK_STATUS": str(second), "TASK_SECONDS": "0.2", "SLURM_JOB_ID": "7"}
  env = os.environ | own | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=env)
  assert (ended.returncode, ended.stdout) == (status, said)


def test_a_flag_that_is_given_is_not_given_twice():
  shown = _dry("slurm", "--nodes=2 --gpus_per_node=8 -- --slice_parallelism=1")
  assert shown.count("--slice_parallelism") == 1


@pytest.mark.parametrize(
  ("name", "program", "arguments"),
  [
    ("tpu_pod", "gcloud", f"--action=delete {POD}"),
    ("gke_xpk", "xpk", """--cluster=c --workload=w --type=t --image=i -- "--a='b c'" '--d=$e'"""),
  ],
)
def test_the_dry_run_prints_what_is_run(tmp_path, name, program, arguments):
  """A stand-in prints the words it gets, one a line; a shell that reads the dry run must get the same words."""
  fake = tmp_path / program
  fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
  path = f"{tmp_path}:{os.environ['PATH']}"
  ran = _launch(name, arguments, path=path)
  assert ran.returncode == 0, ran.stderr
  line = _launch(name, f"--dry_run {arguments}").stdout
  read = subprocess.run(
    ["bash", "-c", line], capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=60
  )
  assert read.stdout == ran.stdout != ""


def test_slurm_gives_sbatch_the_script_of_the_dry_run(tmp_path):
  fake = tmp_path / "sbatch"
  fake.write_text("#!/bin/sh\ncat\n")
  fake.chmod(0o755)
  arguments = "--nodes=1 --gpus_per_node=4 --requeue"
  submitted = _launch("slurm", arguments, path=f"{tmp_path}:{os.environ['PATH']}").stdout
  assert submitted == _launch("slurm", f"--dry_run {arguments}").stdout != ""


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    ("tpu_pod", "--action=create --zone=z", "--name: must be given"),
    ("tpu_pod", f"--action=make {POD} --dry_run", "--action=make: create, install, run, stop or delete"),
    ("tpu_pod", "--acton=create", "unknown option --acton"),
    ("tpu_pod", f"--action=create {POD} --type=v9-1 --dry_run", "--type=v9-1: not known here"),
    (
      "tpu_pod",
      f"--action=create {POD} --slices=two --dry_run",
      "--slices=two: must be a positive whole number",
    ),
    ("gke_xpk", "--cluster=c --workload=w --dry_run", "--type: must be given"),
    ("gke_xpk", "--cluster=c --workload=w --restarts=-1", "--restarts=-1: must be 0 or"),
    ("slurm", "--gpus_per_node=8", "--nodes: must be given"),
    ("slurm", "--nodes=0 --gpus_per_node=8", "--nodes=0: must be a positive whole number"),
    ("slurm", "--nodes=2 --gpus_per_node=8 --per=rack", "--per=rack: node or gpu"),
    ("slurm", "--nodes=2 --gpus_per_node=8 --time=bogus", "--time=bogus: must be MINUTES, HOURS"),
    (
      "slurm",
      "--nodes=2 --gpus_per_node=8 --partition='a\n#SBATCH -w x'",
      "--partition: must not contain line",
    ),
    ("local", "--processes", "--processes: needs a value"),
    ("local", "--dry_run=yes", "--dry_run: takes no value"),
    ("local", "tiny", "unexpected argument 'tiny'"),
    ("local", "--script=nope.py", "--script=nope.py: no such file"),
    ("local", "--python=/no/such/python", "--python=/no/such/python: no such program"),
  ],
)
def test_wrong_options_are_one_line_and_status_2(name, arguments, message):
  ended = _launch(name, arguments)
  assert ended.returncode == 2 and ended.stdout == ""
  assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and message in ended.stderr


def test_a_tool_that_is_missing_is_named(tmp_path):
  for tool in ("bash", "sed", "dirname", "git", "sh"):
    (tmp_path / tool).symlink_to(shutil.which(tool))
  ended = _launch("gke_xpk", "--cluster=c --workload=w --type=t --image=i", path=str(tmp_path))
  assert ended.returncode == 2 and "xpk is not installed; pip install xpk" in ended.stderr
