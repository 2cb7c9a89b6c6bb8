"""Traces of router logits on disk: what is written is what is read, whole steps survive a kill, and damage is noticed."""

import errno
import tracemalloc

import jax
import numpy as np
import pytest

from moe_jax import disk
from moe_jax.analysis.replay.replay import replay
from moe_jax.errors import InputError, of_the_system
from moe_jax.training import router_trace
from moe_jax.training.router_trace import Steps, Trace, TraceWriter, write_by_layer


def make_steps(num: int, rows: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
  rng = np.random.default_rng(seed)
  return [
    {
      "logits_RBLE": rng.normal(size=(2, rows, 3, 5)).astype(np.float16),
      "mask_BL": rng.random((rows, 3)) > 0.2,
      "domain_B": rng.integers(0, 3, rows).astype(np.int32),
      "key_B": rng.integers(0, 99, (rows, 2)).astype(np.uint32),
    }
    for _ in range(num)
  ]


def write(folder, steps, *, first=1, resume_step=0):
  with TraceWriter(folder, {"what": "a test"}, resume_step=resume_step) as writer:
    for i, arrays in enumerate(steps):
      writer.add(first + i, arrays)


def assert_holds(trace: Trace, steps: list[dict], first: int = 1) -> None:
  assert trace.step_I.tolist() == list(range(first, first + len(steps)))
  found = trace.read(0, len(trace))
  for field, name in zip(found._fields[1:], ("logits_RBLE", "mask_BL", "domain_B", "key_B"), strict=True):
    expected = np.stack([arrays[name] for arrays in steps])
    assert getattr(found, field).dtype == expected.dtype
    np.testing.assert_array_equal(getattr(found, field), expected, err_msg=field)


def test_round_trip(tmp_path):
  steps = make_steps(7)
  write(tmp_path / "router_logits", steps)
  trace = Trace(tmp_path)  # a run's folder, or the trace's own
  assert len(trace) == len(Trace(tmp_path / "router_logits")) == 7
  assert trace.shape == (2, 4, 3, 5) and trace.header["what"] == "a test"
  assert_holds(trace, steps)
  assert trace.bytes_per_step == sum(x.nbytes for x in steps[0].values()) + 8 + 4  # step and digest
  records = np.load(tmp_path / "router_logits" / "steps_000000000001.npy")  # any NumPy reads the files
  for name in ("logits_RBLE", "mask_BL", "domain_B"):
    np.testing.assert_array_equal(records[name], np.stack([arrays[name] for arrays in steps]))


def test_layers_in_any_order_are_the_same_trace(tmp_path):
  steps = make_steps(3)
  logits = [step["logits_RBLE"] for step in steps]
  places = np.random.default_rng(0).permutation([(i, r) for i in range(3) for r in range(2)]).tolist()
  with write_by_layer(tmp_path, {"what": "a test"}, steps, 2) as add:
    for i, r in places:
      add(i, r, logits[i][r])
  trace = Trace(tmp_path)
  assert trace.header["what"] == "a test"
  assert_holds(trace, steps)
  with (
    pytest.raises(ValueError, match="logits of 1 layers, and 3 steps have 2 each"),
    write_by_layer(tmp_path / "part", {}, steps, 2) as add,
  ):
    add(0, 0, logits[0][0])
  with pytest.raises(InputError, match="hold no whole step"):
    Trace(tmp_path / "part")


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_chunks_are_the_whole_in_order(tmp_path, size):
  steps = make_steps(7)
  for first, stop in ((0, 2), (2, 3), (3, 7)):  # three files
    write(tmp_path, steps[first:stop], first=first + 1, resume_step=first)
  chunks = list(Trace(tmp_path).chunks(size))
  assert [len(chunk.step_I) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
  logits_IRBLE = np.concatenate([chunk.logits_IRBLE for chunk in chunks])
  np.testing.assert_array_equal(logits_IRBLE, np.stack([arrays["logits_RBLE"] for arrays in steps]))


def test_a_kill_leaves_whole_steps(tmp_path, monkeypatch):
  """Steps that no file has yet are lost, and a file that was being written is as if it were not there."""
  steps = make_steps(5)
  writer = TraceWriter(tmp_path, {})
  for i, arrays in enumerate(steps[:3]):
    writer.add(i + 1, arrays)
  writer.flush()
  writer.add(4, steps[3])
  assert_holds(Trace(tmp_path), steps[:3])

  def killed(handle):
    raise SystemExit

  with monkeypatch.context() as patch, pytest.raises(SystemExit):
    patch.setattr(disk.os, "fsync", killed)
    writer.flush()
  assert_holds(Trace(tmp_path), steps[:3])
  write(tmp_path, steps[3:], first=4, resume_step=3)
  assert_holds(Trace(tmp_path), steps)


def test_neither_writer_nor_reader_holds_the_whole(tmp_path, monkeypatch):
  """Files are written as soon as they have FLUSH_BYTES, and opening a trace loads no logits."""
  step = make_steps(1)[0] | {"logits_RBLE": np.ones((2, 4, 64, 256), np.float16)}
  size = step["logits_RBLE"].nbytes  # 256 kB
  monkeypatch.setattr(router_trace, "FLUSH_BYTES", 4 * size)
  tracemalloc.start()
  try:
    with TraceWriter(tmp_path, {}) as writer:
      for i in range(40):
        writer.add(i + 1, step)
    assert tracemalloc.get_traced_memory()[1] < 16 * size
    tracemalloc.reset_peak()
    trace = Trace(tmp_path)
    assert len(trace) == 40 and trace.shape == (2, 4, 64, 256)
    assert tracemalloc.get_traced_memory()[1] < size
  finally:
    tracemalloc.stop()
  assert 5 < len(list(tmp_path.glob("steps_*.npy"))) <= 10


def test_a_step_that_waits_is_not_missing(tmp_path, monkeypatch):
  """While a run records, the header counts what is on disk."""
  monkeypatch.setattr(router_trace, "FLUSH_BYTES", 1)
  writer = TraceWriter(tmp_path, {})
  for step, arrays in enumerate(make_steps(4), start=1):
    writer.add(step, arrays)
  trace = Trace(tmp_path)
  assert trace.step_I.tolist() == [1, 2, 3] and not trace.missing


@pytest.mark.parametrize("resume_step", [0, 2, 5, 9])
def test_resuming_writes_no_step_twice(tmp_path, resume_step):
  steps = make_steps(5)
  write(tmp_path, steps[:3])
  write(tmp_path, steps[3:], first=4, resume_step=3)
  kept = steps[:resume_step]
  write(tmp_path, steps[len(kept) :], first=len(kept) + 1, resume_step=resume_step)
  assert_holds(Trace(tmp_path), steps)


def test_no_trace_is_one_line(tmp_path):
  with pytest.raises(InputError, match="holds no router logits; train with --record_router_logits=1"):
    Trace(tmp_path)
  write(tmp_path, [])
  with pytest.raises(InputError, match="hold no whole step"):
    Trace(tmp_path)
  write(tmp_path, make_steps(1))
  for name, message in (("steps_000000000001.npy", "is damaged"), ("header.json", "holds no router logits")):
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=message):
      Trace(tmp_path)


@pytest.fixture
def three_files(tmp_path):
  """Steps 1 to 6, two in each of three files."""
  for first in (1, 3, 5):
    write(tmp_path, make_steps(6)[first - 1 : first + 1], first=first, resume_step=first - 1)
  return tmp_path, sorted(tmp_path.glob("steps_*.npy"))


@pytest.mark.parametrize(
  ("lost", "words"),
  [
    (0, "2 of 6 recorded steps are missing: 1 to 2"),
    (1, "3 to 4"),
    (2, "2 of 6 recorded steps are missing: 5 to 6"),
  ],
)
def test_a_file_that_is_lost_is_noticed_by_who_reads_and_by_who_goes_on(three_files, lost, words, capfd):
  folder, files = three_files
  files[lost].unlink()
  trace = Trace(folder)
  expected = [step for step in range(1, 7) if (step - 1) // 2 != lost]
  assert trace.step_I.tolist() == expected and trace.missing.endswith(words)
  assert capfd.readouterr().err.splitlines() == [f"note: {folder}: {trace.missing}"]
  write(folder, make_steps(1), first=7, resume_step=6)
  assert capfd.readouterr().err.splitlines() == [f"note: {folder}: {trace.missing}; the run goes on"]
  assert Trace(folder).step_I.tolist() == [*expected, 7]


def test_no_flipped_bit_gets_through(three_files):
  """Anywhere in a file: in a number, a step, a digest, the type or the shape. Refused, or without consequence."""
  folder, files = three_files
  expected, before = Trace(folder).read(0, 6), files[1].read_bytes()
  rng, refusals = np.random.default_rng(0), 0
  for place in [*rng.integers(0, len(before), 150), *rng.integers(0, 400, 150)]:
    data = bytearray(before)
    data[place] ^= 1 << rng.integers(8)
    files[1].write_bytes(data)
    try:
      trace = Trace(folder)
      found = trace.read(0, 6)
    except InputError as error:
      assert "is damaged" in str(error)
      refusals += 1
    else:  # a blank in the file's header, or a shape without the last step, which is then missing
      keep_I = np.isin(expected.step_I, found.step_I)
      assert keep_I.all() or trace.missing
      jax.tree.map(np.testing.assert_array_equal, found, Steps(*(x[keep_I] for x in expected)))
  assert refusals > 200


def test_a_damaged_header_is_refused(three_files):
  header = three_files[0] / "header.json"
  header.write_text(header.read_text().replace("a test", "a best"))
  with pytest.raises(InputError, match=r"header\.json: is damaged"):
    Trace(three_files[0])


def test_a_damaged_file_is_moved_aside_when_the_run_goes_on(three_files, capfd):
  folder, files = three_files
  data = bytearray(files[1].read_bytes())
  data[-40] ^= 64
  files[1].write_bytes(data)
  write(folder, make_steps(1), first=6, resume_step=5)
  assert (folder / "damaged" / f"{files[1].name}-1").read_bytes() == data
  (line,) = capfd.readouterr().err.splitlines()
  assert f"{files[1].name} is damaged, moved to {folder}/damaged" in line
  assert line.endswith("2 of 5 recorded steps are missing: 3 to 4; the run goes on")
  assert Trace(folder).step_I.tolist() == [1, 2, 5, 6]
  with pytest.raises(InputError, match="2 of 6 recorded steps are missing: 3 to 4; a replay needs all"):
    replay(Trace(folder), "none")


def test_a_trace_of_another_version_is_not_mixed(tmp_path):
  disk.write_json(tmp_path / "header.json", {"format": 3})
  with pytest.raises(InputError, match="of format 3, this writes 4"):
    TraceWriter(tmp_path, {}, resume_step=2)


def test_steps_of_another_shape_are_refused(tmp_path):
  write(tmp_path, make_steps(2))
  with pytest.raises(
    InputError, match=r"holds steps of float16 \(2, 4, 3, 5\), and the run now makes float16"
  ):
    write(tmp_path, make_steps(1, rows=8), first=3, resume_step=2)


def test_a_file_that_cannot_be_read_now_stays_where_it_is(tmp_path, monkeypatch):
  """A run that continues ends, and so does a program that reads the trace."""
  steps = make_steps(3)
  write(tmp_path, steps)
  before = sorted(path.name for path in tmp_path.iterdir())

  def load(*args, **kwargs):
    raise OSError(errno.EIO, "Input/output error")  # as `read` raises it, without a name

  with monkeypatch.context() as patch:
    patch.setattr(np, "load", load)
    for use in (lambda: write(tmp_path, [], resume_step=3), lambda: Trace(tmp_path)):
      with pytest.raises(OSError, match="Input/output error") as found:
        use()
      assert str(of_the_system(found.value)).startswith(f"{tmp_path}/steps_000000000001.npy: ")
  assert sorted(path.name for path in tmp_path.iterdir()) == before
  write(tmp_path, [], resume_step=3)
  assert_holds(Trace(tmp_path), steps)
