"""Where a run may continue: on meshes on which the same tokens are dropped, with the same code of a user's methods."""

import json
import re
import shutil

import pytest

import moe_jax
from moe_jax.cluster import processes
from moe_jax.config import MeshConfig
from moe_jax.config.plain import is_other_code, own_code
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.experts.plain import ReLU
from moe_jax.ops import metrics
from moe_jax.ops.balancing import Balancer
from moe_jax.training.identity import check_same_run, refusal, write_identity
from moe_jax.training.loop import Run
from tests import tiny

CONFIG = tiny.change(tiny.CONFIG, num_steps=1, eval_batches=1, num_layers=1)


@pytest.fixture(scope="module")
def dataset():
  return load_dataset(CONFIG.data)


def test_processes_that_read_other_text_are_refused(dataset, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "from_all", lambda value: [value, "other"])
  with pytest.raises(InputError, match="fingerprint of the text: process 1 has 'other', process 0 '"):
    check_same_run(tmp_path, CONFIG, dataset.info.fingerprint)


def test_a_mesh_on_which_other_groups_share_slots_is_refused(dataset, tmp_path):
  """From config.json, from a checkpoint and from the result. A mesh that only orders sums in another way is not."""
  on = lambda *sizes: MeshConfig(**dict(zip(("data", "fsdp", "expert"), sizes, strict=True)))
  shared = tiny.change(CONFIG, num_steps=1, dispatcher="all_to_all:capacity=device", mesh=on(2, 1, 1))
  Run(shared, dataset, tmp_path).train()
  text = dataset.info.fingerprint
  refused = lambda config: refusal(tmp_path, Run(config, dataset, tmp_path).config, text)
  losses = (lambda: (tmp_path / "config.json").unlink(), lambda: shutil.rmtree(tmp_path / "checkpoints"))
  for lose in (*losses, None):
    for mesh in (on(1, 1, 2), on(1, 2, 1)):
      assert refused(tiny.change(shared, mesh=mesh)) == ""
    for mesh in (on(1, 1, 1), on(4, 1, 1), on(2, 1, 2)):
      line = refused(tiny.change(shared, mesh=mesh))
      parts = mesh.data * mesh.expert
      assert "(then: 'capacity 1/2 per group of 16 (device: 4 groups)'; now: " in line
      assert (
        f"now: 'capacity 1/2 per group of 16 (device: {8 // parts} groups)'); use a mesh that splits" in line
      )
      with pytest.raises(InputError, match="holds a run on a mesh on which other groups share slots"):
        Run(tiny.change(shared, mesh=mesh), dataset, tmp_path).train()
    if lose:
      lose()


def test_other_code_under_the_name_of_a_users_method_is_refused(dataset, tmp_path):
  """From config.json, from a checkpoint and from the result."""

  def mine():
    return Balancer()

  def other():
    return Balancer(init=lambda num_experts: num_experts)

  other.__name__ = other.__qualname__ = "mine"
  of = lambda method: tiny.change(CONFIG, balancers=method)
  Run(of(mine), dataset, tmp_path).train()
  refused = lambda method: refusal(
    tmp_path, Run(of(method), dataset, tmp_path).config, dataset.info.fingerprint
  )
  losses = (lambda: (tmp_path / "config.json").unlink(), lambda: shutil.rmtree(tmp_path / "checkpoints"))
  for lose in (*losses, None):
    assert refused(mine) == ""
    assert re.search(
      r"holds a run with other code of mine \[\w{12}\] \(now: mine \[\w{12}\]\); bring it back",
      refused(other),
    )
    if lose:
      lose()
  assert own_code(Run(CONFIG, dataset, tmp_path / "b").config) == []


def test_other_code_inside_of_a_wrapper_is_refused(dataset, tmp_path, monkeypatch):
  """Of a run that does not say which code was inside, as those of before do not, it is not known."""

  class Mine(ReLU):
    factor = 1.0

  class Other(ReLU):
    factor = 5.0

  Other.__name__, Other.__qualname__ = Mine.__name__, Mine.__qualname__
  config = tiny.change(CONFIG, experts="low_rank:rank=2:experts=mine")

  def resolved(network):
    monkeypatch.setitem(EXPERTS._factories, "mine", network)
    return Run(config, dataset, tmp_path).config

  path, text = tmp_path / "config.json", dataset.info.fingerprint
  write_identity(tmp_path, resolved(Mine), dataset)
  assert refusal(tmp_path, resolved(Mine), text) == ""
  assert "with other code of low_rank:2:experts=mine [+" in refusal(tmp_path, resolved(Other), text)
  path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "own_code"}))
  assert refusal(tmp_path, resolved(Other), text) == ""


@pytest.mark.parametrize(
  ("then", "now", "is_other"),
  [
    (["a [1]"], ["a [1]"], False),
    (["a [1]"], ["a [2]"], True),
    (["a [1]"], ["a [1+2]"], False),  # what is inside was not said
    (["a [1+2]"], ["a [1+3]"], True),
    (["a [1]"], ["a [2+3]"], True),
    (["a [1]"], ["a [1]", "low_rank:mixer=b [+2]"], False),
    (["a [1]"], ["a [1]", "b [2]"], True),
    (["low_rank:mixer=b [+1]"], ["low_rank:mixer=b [+2]"], True),
    (["a [1]", "b [2]"], ["a [1]"], True),
    ([], ["low_rank:mixer=b [+2]"], False),
  ],
)
def test_what_was_not_said_of_code_is_not_known(then, now, is_other):
  assert is_other_code(then, now) is is_other


@pytest.fixture
def registered():
  """Registers a metric with its factor; None: none."""

  def register(factor: float | None) -> None:
    metrics.METRICS.pop("shares", None)
    if factor is not None:
      shares = lambda layer: layer.kept_per_expert_E
      moe_jax.register(
        "metric", "shares", moe_jax.Metric(shares, lambda x: factor * x.max(-1), "S", "Shares")
      )

  yield register
  register(None)


def test_other_code_under_the_name_of_a_users_metric_is_refused(dataset, tmp_path, registered):
  """From config.json, from a checkpoint and from the result; also after a start that did not measure it."""
  refused = lambda: refusal(tmp_path, Run(CONFIG, dataset, tmp_path).config, dataset.info.fingerprint)
  registered(1.0)
  Run(CONFIG, dataset, tmp_path).train()
  registered(None)
  assert refused() == ""
  write_identity(tmp_path, Run(CONFIG, dataset, tmp_path).config, dataset)
  losses = (lambda: (tmp_path / "config.json").unlink(), lambda: shutil.rmtree(tmp_path / "checkpoints"))
  for lose in (*losses, None):
    registered(1.0)
    assert refused() == ""
    registered(10.0)
    assert re.search(
      r"holds a run with other code of the metric shares \[\w{12}\] \(now: shares \[\w{12}\]\); bring it back",
      refused(),
    )
    if lose:
      lose()


def test_a_run_without_a_metric_that_is_registered_now_is_the_same_run(dataset, tmp_path, registered):
  result = Run(CONFIG, dataset, tmp_path).train()
  registered(1.0)
  assert "own_metrics" not in result and "shares" not in result["validation"]
  assert refusal(tmp_path, Run(CONFIG, dataset, tmp_path).config, dataset.info.fingerprint) == ""


@pytest.mark.parametrize(
  ("dispatcher", "before", "same", "other"),
  [
    (
      "all_gather:capacity=global",
      {"data": 2, "expert": 1},
      {"data": 2, "expert": 2},
      {"data": 1, "expert": 2},
    ),
    (
      "dropless:buffer_factor=1.5",
      {"data": 2, "expert": 2},
      {"fsdp": 2, "expert": 2},
      {"data": 1, "expert": 4},
    ),
    ("dropless:buffer_factor=1.5", {"data": 2}, {"data": 4}, {"data": 2, "expert": 2}),
    ("all_to_all", {"data": 2}, {"data": 4, "expert": 2}, None),
  ],
)
def test_which_meshes_drop_the_same_tokens(dispatcher, before, same, other, dataset, tmp_path):
  of = lambda sizes: tiny.change(CONFIG, dispatcher=dispatcher, mesh=MeshConfig(**{"data": 1} | sizes))
  write_identity(tmp_path, Run(of(before), dataset, tmp_path).config, dataset)
  refused = lambda sizes: refusal(
    tmp_path, Run(of(sizes), dataset, tmp_path).config, dataset.info.fingerprint
  )
  assert refused(before) == refused(same) == ""
  assert other is None or "other groups share slots" in refused(other)
