"""Two processes of one program, which join each other by themselves. Not a test."""

import os
import re
import socket
import subprocess
import sys


def run_two(program: str, *arguments: object) -> None:
  """Runs Python code in two processes with two devices each: with the address of the first, its number, and `arguments`."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
  env = os.environ | {
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2",
    "PYTHONPATH": os.getcwd(),
  }
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", program, address, str(i), *map(str, arguments)],
      env=env,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    errors = [process.communicate(timeout=240)[1] for process in pair]
  finally:
    for process in pair:
      process.kill()
  assert [process.returncode for process in pair] == [0, 0], errors
