"""A run on damaged files, on other text, or started twice: it continues to the same numbers, or ends with one line."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moe_jax import disk
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.training.digests import _digest_on_devices, digest, distinct_shards
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from tests import tiny

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "after", "it", "until", "dark"]
STEPS = 6


def write_texts(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
  rng = np.random.default_rng(seed)
  for domain in ("one", "two"):
    (folder / domain).mkdir(parents=True, exist_ok=True)
    for i in range(4):
      (folder / domain / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 300)) + "\n")
  return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  texts = write_texts(tmp_path_factory.mktemp("texts"))
  return tiny.change(
    tiny.CONFIG, dataset="text_folder", text_folder=str(texts), num_steps=STEPS, eval_batches=2, num_layers=1
  )


@pytest.fixture(scope="module")
def dataset(config):
  return load_dataset(config.data)


@pytest.fixture(scope="module")
def finished(config, dataset, tmp_path_factory):
  """(folder, result) of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp("finished")
  return folder, Run(config, dataset, folder, label="arm").train()


def test_a_file_in_place_of_the_checkpoints_is_named_before_training(config, dataset, tmp_path):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(
    InputError, match=r"/checkpoints: is a file, and the folder of checkpoints should be there"
  ):
    Run(config, dataset, tmp_path, label="arm").train()
  assert not (tmp_path / "config.json").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_the_name_of_a_folder_that_is_read_blames_no_flag(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path / "x[y]")
  with pytest.raises(InputError, match=r"^'/.*x\[y\]/checkpoints': '\[' in the path is read as a pattern"):
    Run.load(tmp_path / "x[y]")


@pytest.fixture(scope="module")
def stopped(config, dataset, tmp_path_factory):
  """The folder of a run that was stopped behind the checkpoints of steps 2 and 4."""
  folder = tmp_path_factory.mktemp("stopped")
  with pytest.raises(KeyboardInterrupt):
    Run(tiny.change(config, checkpoint_every=2), dataset, folder, tiny.StopsAt(5), label="arm").train()
  return folder


@pytest.fixture
def left(stopped, tmp_path):
  """A copy of that folder."""
  return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


def continued(config, dataset, folder):
  """(notes, result) of the run that continues in the folder."""
  progress = tiny.StopsAt(0)
  return progress.notes, Run(config, dataset, folder, progress, label="arm", show="mine").train()


def tensorboard_events(path: pathlib.Path):
  """The events of a file, without one that a kill has cut."""
  data, at = path.read_bytes(), 0
  while at + 12 <= len(data):
    size = int.from_bytes(data[at : at + 8], "little")  # length 8, its crc 4, payload, its crc 4
    if at + 16 + size > len(data):
      return
    yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
    at += 16 + size


def test_other_text_is_refused(config, left, tmp_path):
  other = tiny.change(config, text_folder=str(write_texts(tmp_path / "texts", seed=1)))
  data = load_dataset(other.data)
  with pytest.raises(
    InputError, match=r"holds a run on other text \(fingerprint .*another name of --text_folder"
  ):
    Run(other, data, left).train()
  (left / "config.json").unlink()  # the checkpoint says so, too
  with pytest.raises(
    InputError, match=r"holds a run on other text \(fingerprint .*another name of --text_folder"
  ):
    Run(other, data, left).train()
  disk.write_json(left / "config.json", other.to_dict())
  with pytest.raises(
    InputError, match=r"step 4 is of a run on other text \(fingerprint .*another name of --text_folder"
  ):
    Run(other, data, left).train()


def state_files(left: pathlib.Path, folder: str = "d") -> list[pathlib.Path]:
  files = (p for p in (left / "checkpoints/4/state").rglob("*") if p.is_file() and p.parent.name == folder)
  return sorted(files, key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path, at: float) -> None:
  data = bytearray(path.read_bytes())
  data[int(len(data) * at)] ^= 0x10
  path.write_bytes(data)


def cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
  **{f"flipped at {at}": lambda left, at=at: flip(state_files(left)[-1], at) for at in (0.3, 0.6)},
  "position flipped": lambda left: flip(left / "checkpoints/4/extra/metadata", 0.5),
  "position cut": lambda left: cut(left / "checkpoints/4/extra/metadata"),
  "no position": lambda left: shutil.rmtree(left / "checkpoints/4/extra"),
  "arrays cut": lambda left: cut(state_files(left)[-1]),
  "arrays removed": lambda left: state_files(left)[-1].unlink(),
  "no manifest": lambda left: (left / "checkpoints/4/state/manifest.ocdbt").unlink(),
  "metadata cut": lambda left: cut(left / "checkpoints/4/state/_METADATA"),
  "no metadata": lambda left: (left / "checkpoints/4/state/_METADATA").unlink(),
  "outer metadata cut": lambda left: cut(left / "checkpoints/4/_CHECKPOINT_METADATA"),
  "empty": lambda left: (shutil.rmtree(left / "checkpoints/4"), (left / "checkpoints/4").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(config, dataset, finished, left, damage, capsys):
  """The older one gives the same end. Orbax does not read all of its own files, so some damages change nothing."""
  damage(left)
  notes, result = continued(config, dataset, left)
  assert result["validation"] == finished[1]["validation"]
  said = capsys.readouterr().err
  if notes == ["mine: continues from step 4"]:
    assert said == ""
  else:
    assert notes == ["mine: continues from step 2"]
    assert said.startswith("note: ") and said.count("\n") == 1 and "checkpoint of step 4 is damaged" in said
    assert (left / "damaged/4-1").is_dir()  # nothing is deleted
  lines = [read_jsonl(folder / "metrics.jsonl") for folder in (left, finished[0])]
  times = lambda line: {k: v for k, v in line.items() if k != "tokens_per_second"}
  assert [*map(times, lines[0])] == [*map(times, lines[1])]


def test_logs_do_not_show_how_often_a_run_was_killed(config, dataset, tmp_path):
  """Killed without closing anything, behind checkpoints that are off the lines of the log, and continued twice."""
  config = tiny.change(config, tensorboard=True, log_every=2)
  code = (
    "import os, sys; from moe_jax.config import Config; from moe_jax.training import checkpoint, loop;"
    "from moe_jax.data import load_dataset; import json;"
    "config = Config.from_dict(json.loads(sys.argv[1])); save = checkpoint.Checkpoints.save\n"
    "def killed(self, step, *args, **more):\n  save(self, step, *args, **more); self.wait(); step == 3 and os._exit(9)\n"
    "checkpoint.Checkpoints.save = killed; loop.Run(config, load_dataset(config.data), sys.argv[2]).train()"
  )
  often = tiny.change(config, checkpoint_every=1)
  process = subprocess.run(
    [sys.executable, "-c", code, json.dumps(often.to_dict()), str(tmp_path / "killed")]
  )
  assert process.returncode == 9
  with pytest.raises(KeyboardInterrupt):
    Run(often, dataset, tmp_path / "killed", tiny.StopsAt(6)).train()
  Run(config, dataset, tmp_path / "killed").train()
  Run(config, dataset, tmp_path / "whole").train()
  lines = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole")]
  assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [1, 2, 4, 6]
  for name in ("killed", "whole"):  # as TensorBoard reads it: a later file forgets what comes after its start
    shown: dict[int, float] = {}
    for path in sorted((tmp_path / name / "tensorboard").iterdir()):
      for event in tensorboard_events(path):
        if event.HasField("session_log"):
          shown = {step: loss for step, loss in shown.items() if step < event.step}
        for value in event.summary.value:
          if value.tag == "loss":
            shown[event.step] = value.simple_value
    assert shown == pytest.approx({line["step"]: line["loss"] for line in lines[1]}, rel=1e-6)


def test_without_a_whole_checkpoint_it_says_so_and_then_begins_anew(config, dataset, finished, left, capsys):
  for step in (2, 4):
    shutil.rmtree(left / f"checkpoints/{step}/state")
  with pytest.raises(InputError, match=r"no checkpoint is whole: .*step 4.*step 2.* now begins anew"):
    Run(config, dataset, left, label="arm").train()
  assert Run(config, dataset, left, label="arm").train()["validation"] == finished[1]["validation"]


def test_every_bit_and_every_place_counts_in_a_digest(rng):
  """Against sums of bytes, which swaps do not change; layouts over devices do not matter."""
  for dtype in (np.float32, np.int32, np.float16, np.uint8, np.bool_, jnp.bfloat16):
    x = rng.integers(0, 2, (4, 6)).astype(dtype)
    of_x = int(digest(x))
    assert of_x == int(digest(jnp.asarray(x))) == int(_digest_on_devices(jnp.asarray(x)))
    assert int(digest(x[0, 0])) == int(_digest_on_devices(jnp.asarray(x[0, 0])))
    for place in np.ndindex(x.shape):
      other = x.copy()
      other.view(np.uint8).reshape(*x.shape, -1)[place][-1] ^= 1
      assert int(digest(other)) != of_x
    swapped = x.copy()
    swapped[[0, 1]] = x[[1, 0]]
    assert (swapped == x).all() or int(digest(swapped)) != of_x
  x = rng.standard_normal((8, 4)).astype(np.float32)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
  for spec in (("x",), (None, "x"), ()):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    assert int(_digest_on_devices(jax.device_put(x, sharding))) == int(digest(x))


def test_of_equal_shards_one_is_saved(rng):
  """Against the index of every shard, for devices in any order: a copy in shared memory names its parts by their place."""
  x = rng.standard_normal((8, 4)).astype(np.float32)
  for axes in ((), ("a",), ("b",), (None, "a"), ("b", "a"), (("b", "a"),)):
    mesh = jax.sharding.Mesh(rng.permutation(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
    kinds = list({str(shard.index): shard.index for shard in placed.addressable_shards}.values())
    found = distinct_shards(placed)
    assert len(found) == len(kinds)
    for one, index in zip(found, kinds, strict=True):
      np.testing.assert_array_equal(one, x[index])
