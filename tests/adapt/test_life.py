"""Every adaptation on a run and on a published folder: changes what it names and nothing else, composes, is saved, loads, and trains."""

import dataclasses
import fnmatch

import numpy as np
import pytest

import moe_jax
from moe_jax import adapt
from moe_jax.config import MeshConfig
from moe_jax.data import load_dataset
from moe_jax.training.load import load_run
from moe_jax.training.loop import Run
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt import models
from tests.adapt.models import hashes, logits

# Its first layer is dense; Qwen3's family computes the same.
CONFIG = dataclasses.replace(models.CONFIG, num_layers=3, num_dense_first=1)
BATCH = tiny.make_batch()


@pytest.fixture(scope="module", params=["run", "published"])
def loaded(request, tmp_path_factory):
  folder, model = tmp_path_factory.mktemp("source") / "model", models.model(CONFIG)
  if request.param == "run":
    save_model(folder, model, dataclasses.replace(tiny.CONFIG, model=CONFIG))
  else:
    moe_jax.save(model, folder)
  found = moe_jax.load(folder)
  assert hashes(found.model) == hashes(model) and (found.step == 0) and folder == found.folder
  return found


def calibrations(model):
  return adapt.calibrate(model, [BATCH])


def pruned(model):
  return adapt.prune(model, {i: found.tokens_E for i, found in calibrations(model).items()}, 6)


def quantised(model):
  return adapt.quantise(model, "int4", inputs=adapt.expert_inputs(model, [BATCH], per_expert=16))


# What each may change; all else has its old bits, under its old path or that in a wrapper.
ADAPTATIONS = {
  "upcycle": (lambda m: adapt.upcycle(m, models.SPARSE, layers=[0]), ["0.ffn.*"]),
  "adapters": (lambda m: adapt.add_adapters(m, rank=2), []),
  "dropout": (lambda m: adapt.set_dropout(adapt.wrap_experts(m, "expert_dropout:rate=0.4"), 0.1), []),
  "quantised_training": (lambda m: adapt.wrap_experts(m, "quantised_training:format=int8"), []),
  "balancers": (lambda m: adapt.change_moe(m, balancers="switch_loss:0.1"), []),
  "prune": (pruned, ["[12].ffn.experts.*", "[12].ffn.router.*"]),
  "merge": (lambda m: adapt.merge(m, calibrations(m), 6), ["[12].ffn.experts.*"]),
  "task_level": (lambda m: adapt.to_task_level(m, [calibrations(m)] * 2), ["[12].ffn.router.*"]),
  "quantise": (quantised, ["[12].ffn.experts.*"]),
  "dense": (lambda m: adapt.to_dense(m), ["[12].ffn.*"]),
}
WRAPPERS = ("experts.experts.", "mixer.mixer.", "router.router.", "ffn.ffn.")


def plain(path: str) -> str:
  for wrapper in WRAPPERS:
    path = path.replace(wrapper, wrapper.partition(".")[2])
  return path


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_an_adaptation_changes_what_it_names_and_loads_bit_equal(loaded, name, tmp_path):
  change, named = ADAPTATIONS[name]
  before, model = hashes(loaded.model), change(loaded.model)
  after = {plain(path): digest for path, digest in hashes(model).items()}
  changed = {path for path in before if after.get(path) != before[path]}
  assert all(any(fnmatch.fnmatchcase(path, pattern) for pattern in named) for path in changed), changed
  assert bool(changed) == bool(named)
  assert hashes(loaded.model) == before  # what came in is as it was
  save_model(tmp_path / "model", model, loaded.config, loaded.tokenizer)
  again = moe_jax.load(tmp_path / "model")
  assert hashes(again.model) == hashes(model) and again.config.model == model.config


@pytest.fixture(scope="module")
def composed(loaded):
  model = adapt.quantise(adapt.upcycle(loaded.model, models.SPARSE, layers=[0]), "int8")
  return adapt.add_adapters(model, rank=2, parts=["attention"])


def test_adaptations_compose(loaded, composed):
  upcycled = adapt.upcycle(loaded.model, models.SPARSE, layers=[0])
  np.testing.assert_allclose(logits(upcycled), logits(loaded.model), rtol=1e-4, atol=1e-4)
  small = adapt.quantise(pruned(adapt.merge_adapters(adapt.add_adapters(upcycled, rank=2))), "int8")
  np.testing.assert_allclose(logits(small), logits(adapt.dequantise(small)), rtol=1e-4, atol=1e-4)
  assert [moe.num_experts for moe in small.config.moe_configs] and small.config.num_layers == 3
  dequantised = adapt.dequantise(adapt.merge_adapters(composed))
  assert dequantised.config == upcycled.config
  np.testing.assert_allclose(logits(dequantised), logits(composed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loaded", ["run"], indirect=True)
def test_a_composed_model_trains_on_eight_devices_as_on_one(loaded, composed, tmp_path):
  start, found = str(save_model(tmp_path / "start", composed, loaded.config)), {}
  for devices, mesh in {1: tiny.ONE_DEVICE, 8: MeshConfig(data=2, expert=2, tensor=2)}.items():
    fields = {"init_from": start, "trained": "adapters,router", "num_steps": 2, "eval_batches": 1}
    config = tiny.change(dataclasses.replace(tiny.CONFIG, model=composed.config), mesh=mesh, **fields)
    result = Run(config, load_dataset(config.data), tmp_path / str(devices)).train()
    found[devices] = result["validation"]["nll"], load_run(tmp_path / str(devices)).model
  np.testing.assert_allclose(found[8][0], found[1][0], rtol=1e-5)
  np.testing.assert_allclose(logits(found[8][1]), logits(found[1][1]), rtol=1e-3, atol=1e-4)
  before, after = hashes(composed), hashes(found[8][1])
  changed = {path for path in before if before[path] != after[path]}
  assert changed and all("adapters" in path or ".router." in path or "balancer" in path for path in changed)
  assert np.abs(logits(found[1][1]) - logits(composed)).max() > 1e-3
