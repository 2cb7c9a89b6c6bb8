"""Every field of a config.json: where it changes what transformers computes, it changes our model or is refused."""

import functools
import json

import pytest

import moe_jax
from moe_jax.interop.families import FAMILIES, Values
from tests.parity import models, oracles
from tests.parity.test_checkpoints import CASES

# Values of fields that are no number and no boolean, or that say nothing where nothing is said.
VALUES = {
  "hidden_act": ["gelu", "relu"],
  "topk_method": ["greedy", "group_limited_greedy", "noaux_tc"],
  "scoring_func": ["softmax", "sigmoid"],
  "layer_types": [[kind] * 4 for kind in ("full_attention", "sliding_attention", "linear_attention")],
  "mlp_only_layers": [[], [1]],
  "rope_scaling": [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}],
  "rope_parameters": [{"rope_type": kind, "rope_theta": 50.0, "factor": 3.0} for kind in ("yarn", "linear")],
  "clip_qkv": [0.1],
  "sliding_window": [1, 3],
  "use_sliding_window": [True],
  "partial_rotary_factor": [0.5],
  "rope_theta": [77.0],
  "router_jitter_noise": [0.5],
}
# Of the class that all configurations have in common, and of what is around a model: transformers reads them for training,
# for other tasks and for text generation, and as the names of files and versions.
AROUND = set(oracles.transformers.PreTrainedConfig().to_dict()) - {"tie_word_embeddings"}
# They name the class itself, or how long a text is; and MiniMax-01's own code rotates half of a head, which has no other name.
AROUND |= {"model_type", "vocab_size"}


@functools.cache
def fields_of_all() -> frozenset[str]:
  """What any of the classes has: one reads what another names, by `getattr`."""
  configs = (getattr(oracles.transformers, f"{prefix}Config")() for prefix, _ in CASES.values())
  return frozenset().union(*(config.to_dict() for config in configs), VALUES) - AROUND


def others(value, name):
  """Other values of a field."""
  if name in VALUES:
    return VALUES[name]
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int | float):
    return [1, 2, 3, 2 * value + 1] if isinstance(value, int) else [0.01, 1.0, 2 * value + 0.5]
  return [True, 1, 2, 0.3]  # of a field that this class or configuration does not have


def changed(values, name):
  """`values` with other ones of one field, or of one part of the positions."""
  for value in others(values.get(name), name):
    if value != values.get(name):
      yield values | {name: value}
  rope = values["rope_parameters"]
  if name == "rope_parameters":
    more = {"attention_factor": 1.5, "beta_fast": 4.0, "beta_slow": 2.0, "mscale": 0.5, "mscale_all_dim": 0.6}
    more |= {"truncate": not rope.get("truncate", True), "factor": 2.0, "rope_theta": 33.0}
    more |= {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}
    for part, value in more.items():
      yield values | {name: rope | {part: value}}


def logits(prefix, values, weights):
  """What transformers computes with these weights; None: it does not take the configuration, or not the weights."""
  try:
    config = getattr(oracles.transformers, f"{prefix}Config").from_dict(json.loads(json.dumps(values)))
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(oracles.transformers, f"{prefix}ForCausalLM")(config).eval().float()
    model.load_state_dict(weights)
    with oracles.torch.no_grad():
      return model(oracles.torch.tensor(models.TOKENS_BL).long()).logits.numpy()
  except Exception:  # in whatever way a wrong value ends
    return None


@pytest.mark.parametrize("name", CASES)
def test_no_field_is_passed_over(name):
  prefix, fields = CASES[name]
  model = models.build(prefix, **fields)
  weights, values = model.state_dict(), model.config.to_dict()
  family = FAMILIES[values["model_type"]]
  read = lambda values: family.read(Values("config.json", values))
  ours, theirs, compared = read(values), logits(prefix, values, weights), 0
  for field in sorted(fields_of_all()):
    for other in changed(values, field):
      try:
        if read(other) != ours:
          continue
      except (moe_jax.InputError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
        continue  # refused, see `moe_jax.interop.load._naming_file`
      found = logits(prefix, other, weights)
      if found is not None:
        compared += 1
        assert models.distance(found, theirs) < 1e-6, f"{field}={other[field]!r} is not read"
  assert compared > 20
