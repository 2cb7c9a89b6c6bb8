"""Writes metrics to JSON lines, TensorBoard event files, or both. Accepts JAX arrays without importing JAX.

A metric is a scalar, a vector with one value per layer [R], or a matrix such as tokens per expert
[R, E]. `write` converts arrays to numpy, so on an accelerator it waits for the step that computes them.
"""

import abc
import contextlib
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from moe_jax import disk
from moe_jax.errors import InputError

EVENTS = "events.out.tfevents."  # begins the name of an event file; the time in seconds follows

# JSON has no literal for these. Strings preserve the value, and any JSON reader accepts them.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricWriter(abc.ABC):
  """Records the metrics of steps. It is a context manager that closes the files on exit."""

  @abc.abstractmethod
  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Records scalars and arrays under their names. A step may be written more than once."""

  def flush(self) -> None:
    """Hands everything so far to the system, so that the end of this process takes nothing of it along."""

  def close(self) -> None:
    """Closes the files. A second call does nothing."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.close()


class JsonlWriter(MetricWriter):
  """Appends one JSON object per `write` to a file: `{"step": 10, "loss": 2.5, "max_vio": [0.1, 0.2]}`.

  Non-finite floats become the strings "NaN", "Infinity" and "-Infinity"; `read_jsonl` converts them back.
  Every line is flushed, so a killed run loses at most the line that it was writing. The incomplete line is removed
  when the file is next opened.

  Args:
    path: the file; it and its folders are created if absent.
    resume_step: the step of the restored checkpoint. Lines of later steps are removed, because the run will
      write them again. None: keep every complete line.
    expected: the number of lines that were there when that step was saved. If fewer are there, one line says so. Later
      ones of that step are removed: those of an evaluation that was left to a process which ended before it saved.

  Attributes:
    lines: how many there are, or should be.
    again: the lines of `resume_step` if later ones of that step were removed, for `TensorBoardWriter`.
  """

  def __init__(
    self, path: str | os.PathLike[str], *, resume_step: int | None = None, expected: int | None = None
  ):
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    count, self.again = _truncate(self.path, resume_step, expected)
    self.lines = max(count, expected or 0)
    self._file = self.path.open("a", encoding="utf-8", newline="\n")

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    if "step" in metrics:
      raise ValueError("a metric cannot be named 'step': that is the key of the step itself")
    line = {"step": int(step)} | {name: _to_json(to_numpy(name, value)) for name, value in metrics.items()}
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    self.lines += 1

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class TensorBoardWriter(MetricWriter):
  """Writes event files for TensorBoard.

  A scalar `loss` becomes the tag `loss`. A vector `max_vio` [R] becomes the scalars `max_vio/layer_0`, ... A matrix
  `tokens_per_expert` [R, E] becomes one histogram over E values per row, `tokens_per_expert/layer_0`, ...
  Rows with non-finite values get no histogram.

  Args:
    directory: the folder of the event files.
    resume_step: as in `JsonlWriter`; TensorBoard discards events of later steps.
    again: metrics of `resume_step`, with their "step", where TensorBoard is to discard the events of that step, too. They
      are written again.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    resume_step: int | None = None,
    again: Sequence[Mapping[str, Any]] = (),
  ):
    # Here, so that reading JSON lines does not need it. Not its SummaryWriter, whose thread keeps events that a kill
    # then loses, and whose `flush` does not wait for them.
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter

    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    self._events = RecordWriter(os.path.join(os.fspath(directory), _event_file(directory)))
    self._write(Event(file_version="brain.Event:2"))
    if resume_step is not None:
      first = resume_step if again else resume_step + 1
      self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
    for line in again:
      self.write(line["step"], {name: value for name, value in line.items() if name != "step"})

  def _write(self, event: Any) -> None:
    event.wall_time = time.time()
    self._events.write(event.SerializeToString())

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event

    for name, value in metrics.items():
      array = to_numpy(name, value).astype(np.float64)
      if array.ndim > 2:
        raise ValueError(f"metric {name!r} has shape {array.shape}: at most two axes, layers and experts")
      rows = (
        [(name, array)] if array.ndim == 0 else [(f"{name}/layer_{i}", row) for i, row in enumerate(array)]
      )
      for tag, x in rows:
        if x.ndim == 0:
          found = summary.scalar(tag, float(x))
        elif x.size and np.isfinite(x).all():
          found = summary.histogram(tag, x, "auto")
        else:
          continue
        self._write(Event(step=int(step), summary=found))

  def flush(self) -> None:
    self._events.flush()

  def close(self) -> None:
    if self._events:
      self._events.close()
      self._events = None


class MultiWriter(MetricWriter):
  """Writes to several writers, in order. `close` closes all of them even if one fails."""

  def __init__(self, writers: Iterable[MetricWriter]):
    self._writers = list(writers)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    arrays = {
      name: to_numpy(name, value) for name, value in metrics.items()
    }  # one device transfer, not one each
    for writer in self._writers:
      writer.write(step, arrays)

  def flush(self) -> None:
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    with contextlib.ExitStack() as stack:
      for writer in self._writers:
        stack.callback(writer.close)


def _event_file(directory: str | os.PathLike[str]) -> str:
  """Returns a name that comes after those of all event files of a folder, for TensorBoard reads them in that order.

  Names begin with a time in seconds. It is not before those there, whatever the clocks of the hosts say.
  """
  files = (
    path.name.removeprefix(EVENTS).split(".")[0] for path in pathlib.Path(directory).glob(f"{EVENTS}*")
  )
  newest = max((int(second) for second in files if second.isdecimal()), default=0)
  return f"{EVENTS}{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}.{os.getpid()}"


def read_jsonl(path: str | os.PathLike[str], skip_damaged: bool = False) -> list[dict[str, Any]]:
  """Returns the lines of a metrics file as dicts, with non-finite floats restored.

  A last line without a newline, left by a killed run, is skipped.

  Args:
    path: the file.
    skip_damaged: whether other lines that are not whole are skipped, too.

  Raises:
    InputError: unless they are skipped, if any other line is not a JSON object with an integer "step"; the message names the line.
  """
  lines = read_lines(path)[0] if skip_damaged else _lines(pathlib.Path(path))
  return [_restore(line) for _, line in lines]


def to_numpy(name: str, value: Any) -> np.ndarray:
  """Converts a number or an array of numbers to numpy. Types that numpy lacks (bfloat16) become float32."""
  array = np.asarray(value)
  if array.dtype.kind not in "biuf":
    try:
      array = array.astype(np.float32)
    except (TypeError, ValueError):
      raise TypeError(f"metric {name!r} is not a number or an array of numbers: {value!r}") from None
  return array


def _to_json(array: np.ndarray) -> Any:
  """Converts to nested lists of Python numbers that `json.dumps(allow_nan=False)` accepts."""
  if array.dtype.kind != "f" or np.isfinite(array).all():
    return array.tolist()

  def name_non_finite(x: Any) -> Any:
    if isinstance(x, list):
      return [name_non_finite(y) for y in x]
    if math.isfinite(x):
      return x
    return "NaN" if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"

  return name_non_finite(array.tolist())


def _restore(x: Any) -> Any:
  """Undoes `_to_json` on parsed JSON."""
  if isinstance(x, dict):
    return {key: _restore(value) for key, value in x.items()}
  if isinstance(x, list):
    return [_restore(y) for y in x]
  return _NON_FINITE.get(x, x) if isinstance(x, str) else x


def read_lines(path: str | os.PathLike[str]) -> tuple[list[tuple[str, dict[str, Any]]], int]:
  """Returns (text with its newline, parsed object) for every whole line of a metrics file, and how many are not whole.

  A last line without a newline, left by a killed run, counts as not written, and blank lines are none.
  """
  lines, lost = [], 0
  try:
    texts = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  except FileNotFoundError:
    return [], 0
  for text in texts:
    if not text.endswith(b"\n"):
      break
    if not text.strip():
      continue
    try:
      line = disk.parse_json(text.decode())
      if type(line["step"]) is not int or not 0 <= line["step"] < 2**63:
        raise TypeError
      lines.append((text.decode(), line))
    except (ValueError, TypeError, KeyError):
      lost += 1
  return lines, lost


def _lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """The whole lines of a file. Raises `InputError` if any other line is not whole; the message names the line."""
  lines, lost = read_lines(path)
  if lost:
    texts = path.read_bytes().splitlines(keepends=True)
    whole = {text.encode() for text, _ in lines}
    number = next(i for i, text in enumerate(texts, start=1) if text.strip() and text not in whole)
    raise InputError(f'{path}, line {number}: not a JSON object with an integer "step"')
  return lines


def _truncate(
  path: pathlib.Path, resume_step: int | None, expected: int | None
) -> tuple[int, list[dict[str, Any]]]:
  """Removes an incomplete last line, the lines of steps after `resume_step`, and those after the first `expected`.

  One line says so where lines are damaged, or there are fewer than `expected`. The file is moved aside then if something
  in it cannot be read, and its whole lines are kept.

  Returns:
    The number of lines that are kept, and the last step of them, if later lines of it were removed and none is damaged.
  """
  was_there = path.exists()
  lines, lost = read_lines(path)
  reached = [(text, line) for text, line in lines if resume_step is None or line["step"] <= resume_step]
  kept = reached[:expected]
  missing = expected is not None and len(kept) < expected
  if lost or missing:
    torn = was_there and path.stat().st_size > sum(len(text.encode()) for text, _ in lines)
    place = f", moved to {disk.move_aside(path, path.parent)}" if torn else ""
    counts = f"{len(kept)} of {expected} lines up to step {resume_step} are there" if missing else ""
    unread = f"{lost} lines cannot be read{place}; its {len(lines)} whole lines are kept"
    disk.note(f"{path}: {counts}{place}" if missing else f"{path}: {unread}")
  if was_there:
    disk.write_whole(path, "".join(text for text, _ in kept).encode())
  more = len(kept) < len(reached) and not lost
  return len(kept), [_restore(line) for _, line in kept if more and line["step"] == resume_step]
