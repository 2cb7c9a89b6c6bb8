"""What `account` counts equals the arrays of small models, formulas by hand, and published figures."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax.analysis.accounting.storage import QUANTISED, matrix_bytes
from moe_jax.analysis.accounting.text import text
from moe_jax.analysis.flops import forward_flops
from moe_jax.analysis.positions import token_products
from moe_jax.config import BlockConfig, ModelConfig, MoEConfig, OptimizerConfig, Segment
from moe_jax.errors import InputError
from moe_jax.ops.quantisation import quantise
from moe_jax.training.compiled import resolve_config
from moe_jax.training.optim import make_optimizer
from moe_jax.training.results import count_params
from scripts import models_table
from tests import tiny
from tests.scripts import assert_one_line, run_scripts

V = 40
MODEL = ModelConfig(
  num_layers=5,
  num_dense_first=1,
  moe_every=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  dense_dim=24,
  qk_norm=True,
  moe=MoEConfig(
    num_experts=8,
    num_experts_per_token=3,
    expert_dim=10,
    num_shared_experts=2,
    router="sigmoid_topk",
    balancers="loss_free_bias:0.01,z_loss:0.01",
  ),
)


def built(config: ModelConfig) -> moe_jax.Transformer:
  return moe_jax.Transformer(config, V, rngs=nnx.Rngs(0))


def arrays(model: nnx.Module) -> list[np.ndarray]:
  return jax.tree.leaves(nnx.state(model, nnx.Param))


def test_kinds_by_hand():
  """Five layers, of which the third and the fifth have experts."""
  found = moe_jax.account(MODEL, V)
  expected = {
    "embedding": V * 16,
    "head": 16 * V,
    "attention": 5 * 16 * 6 * (4 + 2 + 2 + 4),
    "dense": 3 * 3 * 16 * 24,
    "experts": 2 * 8 * 3 * 16 * 10,
    "shared_experts": 2 * 2 * 3 * 16 * 10,
    "router": 2 * 16 * 8,
    "expert_bias": 2 * 8,
    "norms": 5 * (2 * 16 + 2 * 6) + 16,
  }
  assert found.parameters._asdict() == expected
  assert found.parameters.total == sum(a.size for a in arrays(built(MODEL))) + 2 * 8
  used = found.parameters.total - expected["experts"] * 5 // 8
  assert found.active == (used, used - V * 16, used - 2 * V * 16)
  assert found.training_flops == 3 * found.forward.forward


def test_a_tied_matrix_counts_once_and_as_the_head():
  tied = moe_jax.account(dataclasses.replace(MODEL, tie_embeddings=True), V)
  other = moe_jax.account(MODEL, V)
  assert tied.parameters.total == other.parameters.total - V * 16
  assert tied.active == (other.active.head, other.active.head, other.active.none)


def test_layers_with_other_experts_count_each_on_its_own():
  wide = dataclasses.replace(MODEL.moe, num_experts=16, num_experts_per_token=1)
  blocks = BlockConfig(ffn="mlp"), BlockConfig(), BlockConfig(moe=wide)
  plain = {"num_layers": 3, "num_dense_first": 0, "moe_every": 1}
  found = moe_jax.account(dataclasses.replace(MODEL, segments=(Segment(blocks, 2),), **plain), V)
  assert found.routed == ((2, 8, 3), (2, 16, 1))
  assert found.parameters.experts == 2 * (8 + 16) * 3 * 16 * 10
  assert found.parameters.total - found.active.all == 2 * (5 + 15) * 3 * 16 * 10


def test_all_experts_of_soft_moe_are_active():
  moe = dataclasses.replace(MODEL.moe, router="softmax_topk", balancers="none")
  soft = dataclasses.replace(MODEL, ffn="soft_moe", moe=dataclasses.replace(moe, accept_leaks="soft_moe"))
  found = moe_jax.account(soft, V)
  assert found.active.all == found.parameters.total and found.routed == ()


@pytest.mark.parametrize(
  ("router", "balancers", "most"),
  [("remoe", "remoe_loss", 8), ("expert_threshold:most=5", "expert_threshold", 5)],
)
def test_active_are_k_experts_and_at_most_those_that_a_router_may_choose(router, balancers, most):
  """The latter are those of a result."""
  moe = dataclasses.replace(MODEL.moe, router=router, balancers=balancers)
  config = dataclasses.replace(MODEL, moe=moe)
  found, experts = moe_jax.account(config, V), 2 * 8 * 3 * 16 * 10
  assert found.parameters.total - found.active.all == experts * 5 // 8
  assert found.parameters.total - found.active_at_most.all == experts * (8 - most) // 8
  assert count_params(built(config))[1] == found.active_at_most.all - found.parameters.expert_bias
  line = f"active at most, with embedding and head  {found.active_at_most.all:,}"
  assert " ".join(line.split()) in " ".join(text(found).split())
  plain = moe_jax.account(MODEL, V)
  assert plain.active_at_most == plain.active and "at most" not in text(plain)


class TwoLayers(nnx.Module):
  """A feed-forward part of two layers with experts."""

  def __init__(self, dim, *, rngs):
    make = lambda e, k: moe_jax.MoE(dim, num_experts=e, num_experts_per_token=k, expert_dim=10, rngs=rngs)
    self.first, self.second = make(8, 3), make(4, 1)

  def __call__(self, x_BLD, context):
    raise NotImplementedError


def test_a_block_may_have_two_layers_with_experts():
  blocks = BlockConfig(ffn="mlp"), BlockConfig(ffn=TwoLayers)
  plain = {"num_layers": 3, "num_dense_first": 0, "moe_every": 1}
  config = dataclasses.replace(MODEL, segments=(Segment(blocks, 2),), **plain)
  found = moe_jax.account(config, V)
  assert found.parameters.experts == 2 * (8 + 4) * 3 * 16 * 10
  assert found.parameters.total - found.active.all == 2 * (5 + 3) * 3 * 16 * 10
  assert forward_flops(config, V, 16).experts == 2 * 2 * (3 + 1) * 3 * 16 * 10


def test_a_model_and_its_configuration_have_one_account():
  of_model, of_config = moe_jax.account(built(MODEL)), moe_jax.account(MODEL, V)
  assert of_model == of_config
  assert moe_jax.account("tiny") == dataclasses.replace(
    moe_jax.account(moe_jax.preset("tiny"), 264), name="tiny"
  )


def test_combinations_and_sparsity():
  """120 and 4,426,165,368 are the example of DeepSeekMoE (2401.06066, section 3.1)."""
  sized = lambda e, k: dataclasses.replace(
    MODEL, moe=dataclasses.replace(MODEL.moe, num_experts=e, num_experts_per_token=k)
  )
  rows = [moe_jax.account(sized(e, k), V).routed[0] for e, k in ((16, 2), (64, 8))]
  assert [row.combinations for row in rows] == [120, 4_426_165_368]
  assert [row.sparsity for row in rows] == [8, 8]


def test_bytes_of_plain_types_are_those_of_arrays():
  found, model = moe_jax.account(MODEL, V).weight_bytes, built(MODEL)
  assert found["float32"] == sum(a.nbytes for a in arrays(model)) + 2 * 8 * 4
  assert found["bfloat16"] == found["float32"] / 2


@pytest.mark.parametrize("name", QUANTISED)
def test_bytes_of_a_quantised_matrix_are_those_of_its_arrays(name):
  """Blocks at the edges are cut off, and 4 bits of an odd row have a byte."""
  for shape in ((130, 256), (7, 3), (256, 300)):
    stored = jax.eval_shape(lambda shape=shape: quantise(jnp.zeros((1, *shape)), QUANTISED[name]))
    assert matrix_bytes(QUANTISED[name], *shape) == sum(x.size * x.dtype.itemsize for x in stored)


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_quantised_experts_count_as_what_they_stand_for(format):
  """Their codes are no parameters. Optimizers keep nothing for them."""
  moe = dataclasses.replace(MODEL.moe, experts=f"quantised:format={format}")
  found, plain = moe_jax.account(dataclasses.replace(MODEL, moe=moe), V), moe_jax.account(MODEL, V)
  assert (found.parameters, found.active, found.weight_bytes) == (
    plain.parameters,
    plain.active,
    plain.weight_bytes,
  )
  assert (found.forward, found.decoding_flops) == (plain.forward, plain.decoding_flops)
  assert plain.optimizer_bytes["adamw"] - found.optimizer_bytes["adamw"] == 8 * plain.parameters.experts


def test_quantised_bytes_by_hand():
  """int8: a scale for each output of each matrix in the layers; the rest is bfloat16."""
  columns = {  # outputs of the matrices of all layers
    "attention": 5 * (6 * (4 + 2 + 2) + 16),
    "dense": 3 * (2 * 24 + 16),
    "experts": 2 * 8 * (2 * 10 + 16),
    "shared_experts": 2 * (2 * 2 * 10 + 16),
  }
  found = moe_jax.account(MODEL, V)
  whole = sum(getattr(found.parameters, kind) for kind in columns)
  assert found.weight_bytes["int8"] == whole + 4 * sum(columns.values()) + 2 * (
    found.parameters.total - whole
  )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_has_the_bytes_of_its_arrays(name):
  optimizer = make_optimizer(OptimizerConfig(optimizer=name), num_steps=1)
  state = jax.tree.leaves(optimizer.init(nnx.state(built(MODEL), nnx.Param)))
  assert moe_jax.account(MODEL, V).optimizer_bytes[name] == sum(a.nbytes for a in state)


@pytest.mark.parametrize(
  ("mixer", "scores", "decoding", "cache"),
  [
    # 16 positions, 4 heads of 6. Attention: scores and values, of which a token sees 8.5 on average.
    ("attention", 2 * 4 * 6 * 17 / 2, 2 * 4 * 6 * 16, (2 * 2 * 6 * 2, 0)),
    # a window shows 1, 2, 3, 3, .. positions, and its cache never has more
    ("attention:window=3", 2 * 4 * 6 * (1 + 2 + 14 * 3) / 16, 2 * 4 * 6 * 3, (0, 3 * 2 * 2 * 6 * 2)),
    # keys of 5 + 4, values of 7; behind a cache both are the vector of 8, and keys have its rotated part of 4
    (
      "mla:kv_rank=8:nope_dim=5:rope_dim=4:value_dim=7",
      4 * (5 + 4 + 7) * 17 / 2,
      4 * (8 + 4 + 8) * 16,
      ((8 + 4) * 2, 0),
    ),
    # a state of 6 x 6 in each head is updated and read
    ("lightning", 2 * 4 * 6 * 6, 2 * 4 * 6 * 6, (0, 4 * 6 * 6 * 4)),
  ],
)
def test_what_a_token_costs_beside_matrices(mixer, scores, decoding, cache):
  found = moe_jax.account(dataclasses.replace(MODEL, mixer=mixer, qk_norm=False), V, sequence_length=16)
  assert found.forward.attention_scores == pytest.approx(5 * 2 * scores)
  assert found.decoding_flops - found.forward.forward == pytest.approx(5 * 2 * (decoding - scores))
  per_token, fixed = cache
  assert found.cache == (5 * per_token, 5 * fixed, 5 * (fixed + 16 * per_token))


def test_caches_of_published_models():
  """V3 keeps 512 + 64 numbers in each of 61 layers, and Mixtral 2 x 8 x 128 in each of 32."""
  assert moe_jax.account("deepseek_v3").cache.per_token == 61 * (512 + 64) * 2
  assert moe_jax.account("mixtral_8x7b").cache.per_token == 32 * 2 * 8 * 128 * 2


def test_a_mixer_of_ones_own_has_no_costs_until_it_says_so():
  class Mean(nnx.Module):
    def __init__(self, dim):
      pass

  assert token_products(Mean(4), 16) == 0

  @token_products.register
  def _(mixer: Mean, length: int, decoding: bool = False) -> float:
    return 3.0 * length

  assert token_products(Mean(4), 16, decoding=True) == 48


def test_the_module_of_multi_token_prediction_of_deepseek_v3():
  """2412.19437, section 2.2, without copies of embedding and output matrix."""
  assert moe_jax.account("deepseek_v3").mtp == 11_610_068_224


def test_the_config_json_of_a_checkpoint_is_enough(tmp_path):
  values = {
    "model_type": "mixtral", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.02,
  }  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(values))
  found = moe_jax.account(str(tmp_path))
  assert found == dataclasses.replace(moe_jax.account("mixtral_8x7b"), name=str(tmp_path))
  with pytest.raises(InputError, match=r"nowhere/here: no such folder"):
    moe_jax.account("nowhere/here")


def test_the_config_json_of_a_run_is_enough(tmp_path):
  """The objective of this one has an id of its own, a mask."""
  config = tiny.change(tiny.CONFIG, objective="masked_lm")
  values = config.to_dict() | {"vocab_size": tiny.VOCAB, "domains": ["a"], "fingerprint": "f", "own_code": []}
  (tmp_path / "config.json").write_text(json.dumps(values))
  found = moe_jax.account(str(tmp_path))
  expected = moe_jax.account(resolve_config(config), tiny.VOCAB + 1)
  assert found == dataclasses.replace(expected, name=str(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
  with pytest.raises(InputError, match=r"is no folder of a run; .* arms/ARM"):
    moe_jax.account(str(tmp_path))
  broken = values | {"model": values["model"] | {"mixer": "mine"}}
  (tmp_path / "config.json").write_text(json.dumps(broken))
  with pytest.raises(InputError, match=r"unknown mixer 'mine'.*--plugins=FILE"):
    moe_jax.account(str(tmp_path))


def test_wrong_input_is_one_line():
  with pytest.raises(InputError, match=r"vocab_size=0, .* a configuration does not say its vocabulary"):
    moe_jax.account(MODEL)
  with pytest.raises(InputError, match="unknown preset 'mixtral': did you mean mixtral_8x7b"):
    moe_jax.account("mixtral")


def test_the_tables_of_the_page_are_those_of_the_configurations():
  ended = run_scripts(["scripts/models_table.py", "--check"])[0]
  assert (ended.status, ended.stdout) == (0, ""), f"run python scripts/models_table.py: {ended}"


def test_every_model_with_checkpoints_has_figures_of_parity():
  figures = {name: models_table.parity(name, "gradients") for name in models_table.PUBLISHED}
  assert [name for name, figure in figures.items() if figure == "-"] == ["gshard_600b_like", "switch_c_like"]


def test_a_stale_table_is_written_anew():
  row = moe_jax.account("mixtral_8x7b")
  page = "a\n<!-- models: sizes -->\nold\n<!-- end -->\nb\n"
  new = models_table.rendered(page, [row])
  assert new.startswith("a\n<!-- models: sizes -->\n\n| model |") and new.endswith("\n<!-- end -->\nb\n")
  assert "46,702,792,704" in new and "old" not in new and models_table.rendered(new, [row]) == new
  with pytest.raises(InputError, match="no table 'x'; known: sizes, experts, costs"):
    models_table.rendered(page.replace("sizes", "x"), [row])


def test_the_script():
  path = "scripts/account.py"
  table, both, values, wrong = run_scripts(
    [path, "--model=mixtral_8x7b"],
    [path, "--model=qwen3_30b_a3b", "--against=mixtral_8x7b"],
    [path, "--model=mixtral_8x7b", "--sequence_length=16", "--json"],
    [path, "--model=mixtral"],
  )
  assert "46,702,792,704" in table.stdout and "12,879,925,248" in table.stdout
  (line,) = [line.split() for line in both.stdout.splitlines() if line.startswith("parameters")]
  assert line == ["parameters", "30,532,122,624", "46,702,792,704", "0.654"]
  found = json.loads(values.stdout)
  assert found["parameters"]["total"] == 46_702_792_704 and found["sequence_length"] == 16
  assert found["routed"] == [
    {
      "layers": 32,
      "num_experts": 8,
      "num_experts_per_token": 2,
      "sparsity": 4.0,
      "combinations": math.comb(8, 2),
    }
  ]
  assert_one_line(wrong, "unknown preset 'mixtral': did you mean mixtral_8x7b")
