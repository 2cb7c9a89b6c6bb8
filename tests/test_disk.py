"""What is damaged and cannot be moved aside stays as it is: it is refused in one line, and nothing is written over it."""

import errno
import os
import pathlib

import numpy as np
import pytest

from moe_jax import disk
from moe_jax.analysis.examine import report
from moe_jax.data import cache
from moe_jax.errors import InputError
from moe_jax.training import router_trace, trace_files
from moe_jax.training.made import is_current, new_model
from moe_jax.training.metric_writer import JsonlWriter


def damaged_json(folder: pathlib.Path) -> pathlib.Path:
  disk.write_text(folder / "config.json", "{")
  return folder / "config.json"


def damaged_metrics(folder: pathlib.Path) -> pathlib.Path:
  disk.write_text(folder / "metrics.jsonl", '{"step": 1}\nmine\n{"step": 2}\n')
  return folder / "metrics.jsonl"


def damaged_steps(folder: pathlib.Path) -> pathlib.Path:
  step = {
    "logits_RBLE": np.zeros((1, 1, 1, 2)),
    "mask_BL": np.ones((1, 1)),
    "domain_B": [0],
    "key_B": [[0, 0]],
  }
  with router_trace.TraceWriter(folder, {}, resume_step=0) as writer:
    writer.add(1, step)
  (path,) = trace_files.paths_in(folder)
  path.write_bytes(path.read_bytes()[:-1] + b"?")
  return path


def damaged_cache(folder: pathlib.Path) -> pathlib.Path:
  cache.keep(folder / "tokens", b"1 2 3")
  disk.write_text(folder / "tokens", "1 2 ?")
  return folder / "tokens"


def model(folder: pathlib.Path, config: str) -> pathlib.Path:
  disk.write_text(folder / "model/config.json", config)
  disk.write_text(folder / "model/made_of.json", '{"step": 1}')
  return folder / "model"


def write_model(path: pathlib.Path) -> None:
  with new_model(path) as folder:
    disk.write_text(folder / "config.json", "{}")


USES = {
  "json": (damaged_json, lambda path: disk.set_aside_damaged(path, path.parent, "it is written again")),
  "metrics": (damaged_metrics, lambda path: JsonlWriter(path, resume_step=2)),
  "router logits": (damaged_steps, lambda path: trace_files.keep_whole(path.parent, 1, 1)),
  "cache": (damaged_cache, cache.read),
  "another model": (lambda folder: model(folder, "{}"), lambda path: is_current(path, {"step": 2})),
  "model that is not whole": (lambda folder: model(folder, "{"), write_model),
}


def everything(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_file(folder: pathlib.Path, monkeypatch) -> str:
  (folder / "damaged").write_text("notes of mine")
  return "which is no folder"


def not_writable(folder: pathlib.Path, monkeypatch) -> str:
  """Also for root."""

  def rename(self, target):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

  monkeypatch.setattr(pathlib.Path, "rename", rename)
  return r"\(Permission denied\)"


@pytest.mark.parametrize("prevent", [a_file, not_writable])
@pytest.mark.parametrize(("make", "use"), USES.values(), ids=USES)
def test_what_cannot_be_moved_aside_is_refused(make, use, prevent, tmp_path, monkeypatch, capsys):
  path = make(tmp_path)
  reason = prevent(tmp_path, monkeypatch)
  before = everything(tmp_path)
  line = rf"^{path}: (is|its) .*, and cannot be moved to {tmp_path}/damaged {reason}; move it away$"
  for _ in range(2):  # at every start
    with pytest.raises(InputError, match=line):
      use(path)
  assert everything(tmp_path) == before and capsys.readouterr().err == ""


def test_a_damaged_cache_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, monkeypatch, capsys):
  path = damaged_cache(tmp_path)
  a_file(tmp_path, monkeypatch)
  monkeypatch.setattr(cache.os, "access", lambda *of: False)
  assert cache.read(path) is None and path.read_text() == "1 2 ?"
  assert f"{path}: is damaged, and stays where it is" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
  link, loop = tmp_path / "link", tmp_path / "loop"
  link.symlink_to(tmp_path / "gone")
  loop.symlink_to(loop)
  for path, target in ((link, "gone"), (link / "run", "gone"), (loop, "loop")):
    with pytest.raises(
      InputError, match=rf"^--output_dir={path}: .*is a link to {tmp_path}/{target}, which is"
    ):
      disk.check_folder(path)
  with pytest.raises(InputError, match=rf"^--json={tmp_path}: is a folder; name a file$"):
    disk.check_file(tmp_path, "json")
  (tmp_path / "gone").mkdir()
  disk.check_folder(link)
  disk.check_file(link / "new/scores.json", "json")
  assert list((tmp_path / "gone").iterdir()) == []

  def read_only(**kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(disk.tempfile, "TemporaryFile", read_only)
  for check in (
    disk.check_folder,
    report.check_folder,
    lambda path: disk.check_file(path / "x", "output_dir"),
  ):
    with pytest.raises(InputError, match=rf"^--output_dir={tmp_path}.* cannot be written \(Read-only file"):
      check(tmp_path / "new")


def test_damaged_files_of_one_name_have_names_of_their_own(tmp_path):
  for number in (1, 2, 3):
    path = damaged_json(tmp_path)
    assert disk.move_aside(path, tmp_path) == tmp_path / f"damaged/config.json-{number}"
