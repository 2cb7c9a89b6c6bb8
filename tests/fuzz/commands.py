"""Command lines with wrong, absurd and hostile values, and a child process that runs them one after the other."""

import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys

from hypothesis import strategies as st

from tests.fuzz.values import FLOATS, INTEGERS, TEXTS

ROOT = pathlib.Path(__file__).resolve().parents[2]
# With flags that keep what is accepted small. Scripts that measure, or that need a GPU, transformers or network namespaces,
# are not here.
SCRIPTS = {
  "experiments/load_balancing.py": ["--preset=tiny", "--dataset=markov"],
  "experiments/routers.py": ["--preset=tiny", "--dataset=markov"],
  "experiments/capacity.py": [
    "--preset=tiny",
    "--dataset=markov",
    "--methods=none",
    "--capacity_factors=1",
    "--group=batch",
  ],
  "experiments/communication.py": [],
  "experiments/compress.py": [],
  "experiments/distil.py": [],
  "experiments/examine.py": [],
  "experiments/finetune.py": [],
  "experiments/granularity.py": ["--dataset=markov", "--arms=16x64_top2"],
  "experiments/quantise.py": [],
  "experiments/replay.py": [],
  "experiments/speedrun.py": [],
  "experiments/upcycle.py": ["--preset=tiny", "--dataset=markov"],
  "scripts/account.py": [],
  "scripts/coefficients.py": [],
  "scripts/evaluate.py": [],
  "scripts/generate.py": [],
  "scripts/join.py": [],
}
LIMIT = 120.0  # seconds that an answer may take


class Child:
  """Runs command lines in a folder of its own."""

  def __init__(self, folder: pathlib.Path, devices: int = 1):
    self.devices = devices
    self.folder = folder / "a" / "b" / "c"  # of which ../.. is still the test's
    self.folder.mkdir(parents=True)
    self.process = None
    self.flags: dict[str, dict[str, list]] = {}

  def ask(self, script: str, arguments: list[str] | None) -> dict:
    if self.process is None:
      xla = f"--xla_force_host_platform_device_count={self.devices}"
      environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(self.folder), "XLA_FLAGS": xla}
      self.process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fuzz/child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=self.folder,
        env=environment,
      )
    self.process.stdin.write(json.dumps([str(ROOT / script), arguments]).encode() + b"\n")
    self.process.stdin.flush()
    ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
    answer = self.process.stdout.readline() if ready else b""
    if not answer:
      self.close()
      return {"status": None, "out": "", "err": "hangs" if not ready else "crashed", "seconds": LIMIT}
    return json.loads(answer)

  def flags_of(self, script: str) -> dict[str, list]:
    if script not in self.flags:
      self.flags[script] = self.ask(script, None)
    return self.flags[script]

  def close(self) -> None:
    if self.process:
      with contextlib.suppress(OSError):
        self.process.stdin.close()
      self.process.kill()
      self.process.wait()
      self.process.stdout.close()
      self.process = None


@st.composite
def command_lines(draw, child: Child):
  """(script, arguments)."""
  script = draw(st.sampled_from(sorted(SCRIPTS)))
  known = child.flags_of(script)
  arguments = list(SCRIPTS[script])
  for name in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=4)):
    kind, choices = known[name]
    if kind == "bool":
      values = st.sampled_from(["true", "false", "maybe", "", "2"])
    elif choices:
      values = st.sampled_from(choices) | TEXTS
    else:
      values = {"int": INTEGERS, "float": FLOATS}.get(kind, TEXTS | INTEGERS | FLOATS)
    arguments.append(f"--{name}={draw(values)}")
  if draw(st.integers(0, 9)) == 0:
    arguments.append(draw(TEXTS))
  # What a shell can pass: no zero bytes.
  return script, [argument.replace("\0", "") for argument in arguments]


def problem(ended: dict) -> str:
  """What is wrong with how a command line ended; empty: nothing."""
  err = ended["err"]
  lines = [line for line in err.splitlines() if not line.startswith("note: ")]
  if ended["status"] == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
    return f"status 2 without one line: {err[-3000:]}"
  if ended["status"] not in (0, 2) or "Traceback" in err:
    return f"status {ended['status']}: {err[-3000:]}"
  return (
    f"was refused after {ended['seconds']:.0f} s" if ended["status"] and ended["seconds"] > LIMIT / 4 else ""
  )
