"""Runs command lines that it reads from stdin, one JSON list per line, and answers how each ended. Started by `commands.py`.

What takes long and comes after all checks is left out: training, and compiling for other machines.
"""

import contextlib
import io
import json
import os
import resource
import runpy
import sys
import time
import traceback

from absl import flags

MEMORY = 24 << 30  # bytes of addresses, of which JAX's threads take many; beyond them is a MemoryError


def _own_flags() -> list[flags.Flag]:
  module = flags.FLAGS.find_module_defining_flag
  libraries = ("absl.", "array_record.", "grain.")
  return [flags.FLAGS[n] for n in list(flags.FLAGS) if not module(n).startswith(libraries)]


def _forget() -> None:
  """Every script defines its flags anew."""
  for flag in _own_flags():
    if flag.name in flags.FLAGS:
      delattr(flags.FLAGS, flag.name)
  flags.FLAGS.unparse_flags()
  for name in ("plugins", "verbosity"):
    if name in flags.FLAGS:
      flags.FLAGS[name].unparse()


def _flags_of(path: str) -> dict[str, list]:
  """name -> [type, values of an enum] of every flag of a script."""
  _forget()
  runpy.run_path(path, run_name="fuzzed")
  found = {f.name: [f.flag_type(), list(getattr(f.parser, "enum_values", []))] for f in _own_flags()}
  _forget()
  return found


def _run(path: str, arguments: list[str]) -> dict:
  _forget()
  sys.argv, status, trace = [path, *arguments], 0, ""
  started = time.monotonic()
  with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
    try:
      runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
      status = end.code or 0
    except BaseException:
      status, trace = 1, traceback.format_exc()
  seconds = time.monotonic() - started
  return {"status": status, "out": out.getvalue()[:2000], "err": err.getvalue() + trace, "seconds": seconds}


def _stop(*unused, **unused_too):
  """Stands for what follows when everything is checked."""
  sys.exit(0)


def main() -> None:
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  from moe_jax.training import evaluation, loop

  loop.Run.train = evaluation.evaluate_as = _stop
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  for line in sys.stdin:
    path, arguments = json.loads(line)
    answers.write(json.dumps(_flags_of(path) if arguments is None else _run(path, arguments)) + "\n")
    answers.flush()


if __name__ == "__main__":
  main()
