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
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from moe_jax.errors import InputError

# JSON has no literal for these. Strings preserve the value, and any JSON reader accepts them.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricWriter(abc.ABC):
  """Records the metrics of steps. It is a context manager that closes the files on exit."""

  @abc.abstractmethod
  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Records scalars and arrays under their names. A step may be written more than once."""

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
  """

  def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None):
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    if self.path.exists():
      _truncate(self.path, resume_step)
    self._file = self.path.open("a", encoding="utf-8", newline="\n")

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    if "step" in metrics:
      raise ValueError("a metric cannot be named 'step': that is the key of the step itself")
    line = {"step": int(step)} | {name: _to_json(to_numpy(name, value)) for name, value in metrics.items()}
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
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
  """

  def __init__(self, directory: str | os.PathLike[str], *, resume_step: int | None = None):
    import tensorboardX  # here, so that reading JSON lines does not need it

    purge_step = None if resume_step is None else resume_step + 1
    self._writer = tensorboardX.SummaryWriter(os.fspath(directory), purge_step=purge_step)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    for name, value in metrics.items():
      array = to_numpy(name, value).astype(np.float64)
      if array.ndim == 0:
        self._writer.add_scalar(name, float(array), step)
      elif array.ndim == 1:
        for layer, x in enumerate(array):
          self._writer.add_scalar(f"{name}/layer_{layer}", float(x), step)
      elif array.ndim == 2:
        for layer, row in enumerate(array):
          if row.size and np.isfinite(row).all():
            self._writer.add_histogram(f"{name}/layer_{layer}", row, step)
      else:
        raise ValueError(f"metric {name!r} has shape {array.shape}: at most two axes, layers and experts")

  def close(self) -> None:
    self._writer.close()


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

  def close(self) -> None:
    with contextlib.ExitStack() as stack:
      for writer in self._writers:
        stack.callback(writer.close)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the lines of a metrics file as dicts, with non-finite floats restored.

  A last line without a newline, left by a killed run, is skipped.

  Raises:
    InputError: if any other line is not a JSON object with an integer "step"; the message names the line.
  """
  return [_restore(line) for _, line in _lines(pathlib.Path(path))]


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


def _lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """Returns (text with its newline, parsed object) for every complete line."""
  lines = []
  with path.open(encoding="utf-8", newline="\n", errors="replace") as file:
    for number, text in enumerate(file, start=1):
      if not text.endswith("\n"):
        break  # incomplete, left by a killed run
      try:
        line = json.loads(text)
        if not isinstance(line["step"], int):
          raise TypeError
      except (ValueError, TypeError, KeyError):
        raise InputError(f'{path}, line {number}: not a JSON object with an integer "step"') from None
      lines.append((text, line))
  return lines


def _truncate(path: pathlib.Path, resume_step: int | None) -> None:
  """Removes an incomplete last line and the lines of steps after `resume_step`. The file is replaced atomically."""
  kept = [text for text, line in _lines(path) if resume_step is None or line["step"] <= resume_step]
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w", encoding="utf-8", newline="\n") as file:
    file.writelines(kept)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
