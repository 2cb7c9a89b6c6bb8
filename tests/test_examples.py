"""The short programs in experiments/examples run as they are written, and do what they say."""

import dataclasses
import importlib
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import sharding
from moe_jax.plugins import import_plugins
from moe_jax.training.compiled import check_run
from moe_jax.training.own_leaks import sees_later_tokens
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "experiments" / "examples"
CONFIG = tiny.change(tiny.CONFIG, num_steps=6, eval_batches=2, jitter=0.0, balancers="none", clip_norm=1.0)


def example(name):
  return importlib.import_module(f"experiments.examples.{name}")


def lines_of_code(name):
  """Without docstring, blank lines and what prints."""
  text = (EXAMPLES / f"{name}.py").read_text().split('"""', 2)[2]
  return sum(
    bool(line.strip()) and "print(" not in line for line in text.partition("if __name__")[0].splitlines()
  )


def compare(arms, folder):
  return moe_jax.Comparison(arms, seeds=[0], config=CONFIG, output_dir=folder).run()


def max_vio(result):
  return np.mean(result["validation"]["max_vio"])


def test_the_layer_balances_in_a_loop_of_ones_own():
  before, after = example("own_loop").main()
  assert after < 0.6 * before


def test_whether_the_router_of_ones_own_looks_ahead_is_measured(capsys):
  config = tiny.change(CONFIG, router=example("cosine_router").CosineRouter)
  model = check_run(config, sharding.make_mesh(CONFIG.mesh)).model
  assert (sees_later_tokens(model), capsys.readouterr().err) == (False, "")


def test_a_router_of_ones_own_in_a_layer_in_a_comparison_and_by_name(tmp_path, rng):
  cosine = example("cosine_router").CosineRouter
  assert lines_of_code("cosine_router") <= 20
  x_BLD = rng.normal(size=(2, 8, 16)).astype(np.float32)
  sizes, rngs = {"num_experts": 4, "num_experts_per_token": 2}, nnx.Rngs(0)
  own = cosine(dim=16, **sizes, rngs=rngs)
  layers = [moe_jax.MoE(16, **sizes, expert_dim=8, router=own, rngs=rngs)]
  layers += [moe_jax.MoE(16, **sizes, expert_dim=8, router=r, rngs=nnx.Rngs(0)) for r in (cosine, "cosine")]
  forward = jax.jit(lambda layer, x_BLD: layer(x_BLD))
  outputs = [forward(layer, x_BLD)[0] for layer in layers]
  for y_BLD in outputs[1:]:
    np.testing.assert_array_equal(y_BLD, outputs[0])  # an object, its class and its name are the same router
  # Scores are cosines: the length of a token does not matter, and the temperature does.
  plain, scaled = (forward(layers[0], scale * x_BLD)[1] for scale in (1, 10))
  np.testing.assert_array_equal(scaled.tokens_per_expert_BE, plain.tokens_per_expert_BE)
  import_plugins([str(EXAMPLES / "cosine_router.py")])
  arms = {
    "softmax": {"router": "softmax_topk"},
    "cosine": {"router": "cosine:temperature=0.1"},
    "class": {"router": cosine},
  }
  results = compare(arms, tmp_path / "run")
  assert len({round(r["validation"]["nll"], 6) for r in results}) == 3  # three routers, trained


def test_a_balancer_that_is_edited_trains_as_its_new_self(tmp_path):
  module = example("own_balancer")
  folder = tmp_path / "run"
  none, mine = compare({name: module.ARMS[name] for name in ("none", "mine")}, folder)
  assert max_vio(mine) < max_vio(none)

  source = (
    (EXAMPLES / "own_balancer.py").read_text().replace("bias_E + rate", "bias_E - rate")
  )  # the wrong way
  space = {"__name__": module.__name__}
  exec(compile(source.partition("ARMS =")[0], "a_cell", "exec"), space)
  edited = {"mine": {"balancers": space["centred_bias"]}}
  with pytest.raises(moe_jax.InputError, match=r"arm mine: the code of balancers 'centred_bias' has changed"):
    compare(edited, folder)
  (worse,) = compare(edited, tmp_path / "anew")
  assert max_vio(worse) > max_vio(mine)


def test_a_model_of_different_layers_trains_on_eight_devices(tmp_path, monkeypatch):
  """That its steps are those on one device, recomputed or not: tests/nn/test_stack.py."""
  module = example("mixed_layers")
  monkeypatch.setattr(module, "MODEL", dataclasses.replace(module.MODEL, remat="none"))  # compiles faster
  result = module.train(moe_jax.MeshConfig(data=2, expert=4), tmp_path)
  assert len(result["validation"]["max_vio"]) == 6  # layers with experts, of 7
  assert result["device"].endswith("x 8") and np.isfinite(result["validation"]["nll"])


def test_a_run_is_looked_into(tmp_path, capsys):
  config = tiny.change(moe_jax.preset("tiny"), num_steps=2, eval_batches=1, tensorboard=False)
  config = tiny.change(config, mesh=tiny.ONE_DEVICE, sequence_length=32)
  moe_jax.Run(config, moe_jax.load_dataset(config.data), tmp_path).train()
  text, taken_RLE = example("look_inside").main(tmp_path, prompt="def f(", num_tokens=3)
  assert text.startswith("def f(") and taken_RLE.shape == (2, 1 + 6 + 3, 8)
  assert (taken_RLE.sum(axis=-1) == 2).all()
  assert "experts by layer" in capsys.readouterr().out


def test_an_objective_and_a_hook_of_ones_own(tmp_path):
  import_plugins([str(EXAMPLES / "own_objective.py")])
  arms = {"plain": {}, "smooth": {"objective": "label_smoothing:0.3", "hooks": "averaged:0.9"}}
  plain, smooth = compare(arms, tmp_path / "run")
  assert plain["training"]["loss"] != smooth["training"]["loss"]
  assert plain["objective"] == "next_token" and smooth["objective"] == "label_smoothing:0.3"
  check_run(tiny.change(CONFIG, hooks="averaged:0.9"), sharding.make_mesh(CONFIG.mesh))
