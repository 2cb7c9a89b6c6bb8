"""What cannot be read now, for a reason that says nothing about its bytes, stays where it is."""

import errno
import os
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_jax import disk, errors
from moe_jax.cluster import processes
from moe_jax.errors import InputError, is_of_the_machine, of_the_system
from moe_jax.training import reading
from moe_jax.training.checkpoint import Checkpoints

STATE = {"w": jnp.arange(3000.0), "b": jnp.zeros(3)}
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)
HERE = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), SHAPES)

NUMBERS = [errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT]
PASSING = [
  *(OSError(number, os.strerror(number)) for number in (*NUMBERS, errno.ENOMEM)),
  MemoryError(),
  RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes"),
  # As TensorStore says it, without and with the number.
  ValueError('UNKNOWN: Error opening "zarr" driver: Failed to open: "/x/manifest.ocdbt": Input/output error'),
  ValueError("UNKNOWN: Error opening local file [OS error 24: EMFILE]"),
  ExceptionGroup("reads", [ValueError("x"), OSError(errno.EIO, "Input/output error")]),
]
DAMAGED = [
  FileNotFoundError(errno.ENOENT, "No such file or directory"),
  ValueError("DATA_LOSS: Error decoding manifest: Encoded length (0) is less than minimum length (16)"),
  KeyError("w"),
]


@pytest.fixture
def checkpoints(tmp_path):
  """Two whole ones, of steps 1 and 2."""
  found = Checkpoints(tmp_path / "run/checkpoints")
  for step in (1, 2):
    found.save(step, STATE, {"step": step})
  found.wait()
  yield found
  found.close()


def everything(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.rglob("*"))


def test_errors_of_the_machine_are_told_from_damage():
  assert [is_of_the_machine(error) for error in (*PASSING, *DAMAGED)] == [True] * 13 + [False] * 3
  try:
    try:
      raise OSError(errno.EIO, "Input/output error")
    except OSError as error:
      raise KeyError("w") from error
  except KeyError as error:
    assert is_of_the_machine(error)


def test_a_number_of_the_system_is_of_the_machine_unless_it_says_what_a_file_is():
  """All numbers there are: a list of those that pass would lack those of the next file system."""
  of_the_file = ["ENOENT", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP", "EINVAL", "EOVERFLOW", "ESPIPE"]
  of_the_file += ["EEXIST", "ENOTEMPTY"]
  for number, name in errno.errorcode.items():
    expected = name not in of_the_file
    assert is_of_the_machine(OSError(number, os.strerror(number), "/x")) == expected, name
    assert is_of_the_machine(ValueError(f"UNKNOWN: Error reading [OS error {number}: {name}]")) == expected
  for name in {"EREMOTEIO", "EUCLEAN", "ESHUTDOWN"} & set(
    errno.errorcode.values()
  ):  # TensorStore, without the number
    words = os.strerror(getattr(errno, name))
    assert is_of_the_machine(
      ValueError(f'UNKNOWN: Error opening "zarr" driver: Failed to open: "/x": {words}')
    )
  assert not is_of_the_machine(OSError("Not a gzipped file"))  # of a library, without a number


def test_a_system_that_lacks_names_of_errors_has_the_others(monkeypatch):
  for name in ("EREMOTEIO", "EUCLEAN", "ENOKEY", "ENODATA"):  # macOS has no such names
    monkeypatch.delattr(errno, name, raising=False)
  elsewhere = runpy.run_path(errors.__file__)
  assert elsewhere["is_of_the_machine"](ValueError("x: Stale file handle"))


@pytest.mark.parametrize("number", [*NUMBERS, errno.ESHUTDOWN])
def test_a_json_file_that_cannot_be_read_now_is_not_taken_for_damaged(number, tmp_path, monkeypatch):
  """Neither is it taken for absent, which would let a run begin anew."""
  path = tmp_path / "run/config.json"
  disk.write_json(path, {"steps": 3})
  before = everything(tmp_path)

  def read_text(*args, **kwargs):
    raise OSError(number, os.strerror(number))  # as `read` raises it, without a name

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "read_text", read_text)
    for read in (
      disk.read_object,
      lambda path: disk.set_aside_damaged(path, path.parent, "it is begun anew"),
    ):
      with pytest.raises(OSError, match=os.strerror(number)) as found:
        read(path)
      assert str(of_the_system(found.value)).startswith(f"{path}: ")
  assert everything(tmp_path) == before and disk.read_object(path) == {"steps": 3}
  assert disk.read_object(path.with_name("absent.json")) is None


def test_an_error_that_passes_moves_nothing(checkpoints, tmp_path, monkeypatch, capsys):
  """Of reads of arrays and of what is beside them: one line, and the next start continues from the newest."""
  before = everything(tmp_path)
  line = r"checkpoints/2: cannot read it now \(.*nothing was changed, and the same command continues from it"

  def fails(error):
    def read(*args, **kwargs):
      raise error

    return read

  for owner, name in ((ocp.StandardCheckpointHandler, "restore"), (reading.disk, "parse_json")):
    for error in (PASSING[0], PASSING[9]) if name == "restore" else (PASSING[0], PASSING[8]):
      with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails(error))
        patch.setattr(reading.time, "sleep", lambda seconds: None)
        with pytest.raises(InputError, match=line):
          checkpoints.restore(SHAPES, HERE, move_damaged=True)
  assert everything(tmp_path) == before and capsys.readouterr().err == ""
  state, extra = checkpoints.restore(SHAPES, HERE, move_damaged=True)
  jax.tree.map(np.testing.assert_array_equal, state, STATE)
  assert extra == {"step": 2}


def test_devices_of_other_processes_are_no_damage(checkpoints, tmp_path, capsys):
  before = everything(tmp_path)
  elsewhere = types.SimpleNamespace(sharding=types.SimpleNamespace(addressable_devices=set()))
  with pytest.raises(
    InputError, match="checkpoints/2: process 0 has none of the devices that the arrays should be on"
  ):
    reading.read_checkpoint(checkpoints.folder / "2", {"w": elsewhere})
  assert everything(tmp_path) == before and capsys.readouterr().err == ""


def test_one_process_that_cannot_read_ends_all(checkpoints, tmp_path, monkeypatch):
  before, from_all = everything(tmp_path), processes.from_all
  monkeypatch.setattr(processes, "from_all", lambda value: [*from_all(value), "OSError: [Errno 5]"])
  with pytest.raises(
    InputError, match=r"checkpoints/2: process 1 cannot read it now \(OSError: \[Errno 5\]\)"
  ):
    checkpoints.restore(SHAPES, HERE, move_damaged=True)
  assert everything(tmp_path) == before
