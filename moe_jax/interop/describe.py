"""From a configuration to the config.json of the published family that it belongs to."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

from flax import nnx

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig, Segment, spec_text
from moe_jax.errors import InputError
from moe_jax.interop.families import FAMILIES, Family, Values
from moe_jax.interop.families.fields import layers_of, shared_moe
from moe_jax.nn.block import Block
from moe_jax.nn.build import make_blocks, resolve
from moe_jax.nn.variables import abstract
from moe_jax.registry import Method
from moe_jax.sharding.dispatchers import make_dispatcher

# The fields of a layer with experts that change what it computes in evaluation, if no token is dropped: `dropping_line`.
_MOE_FIELDS = (
  "num_experts",
  "num_experts_per_token",
  "expert_dim",
  "router",
  "experts",
  "shared_expert_gate",
)


def describe(config: ModelConfig, vocab_size: int, model_type: str = "") -> tuple[Family, dict[str, Any]]:
  """Finds the family of a model.

  Args:
    config: resolved.
    vocab_size: V.
    model_type: the family that is tried first.

  Returns:
    The first family whose config.json, read back, gives a model that computes the same, and its values.

  Raises:
    InputError: if there is none. The message says how the nearest family differs.
  """
  families = sorted(FAMILIES.values(), key=lambda family: family.model_type != model_type)
  found: list[tuple[bool, int, Family, list[str]]] = []
  for family in families:
    common = {
      "model_type": family.model_type,
      "architectures": [family.architecture],
      "vocab_size": vocab_size,
    }
    try:
      values = common | family.write(shared_moe(config))
      differences = list(_differences(config, _read_back(family, values)))
      if not differences:
        return family, values
      found.append((False, len(differences), family, differences))
    except InputError as error:  # its config.json cannot say anything like it
      found.append((True, 1, family, [str(error)]))
  _, _, family, differences = min(found, key=lambda entry: entry[:2])
  others = f" ({len(differences) - 1} other differences)" if len(differences) > 1 else ""
  raise InputError(
    "save: no published family computes what this model does; "
    f"the nearest is {family.model_type}, where {differences[0]}{others}"
  )


def balancers_line(config: ModelConfig, family: Family, values: dict[str, Any]) -> str:
  """Returns the line about balancers that the values of a config.json do not hold. Empty if they hold all of them.

  Args:
    config: resolved; `describe` found family and values for it.
    family, values: what the config.json is read with, and what it has.
  """
  of = lambda config: [block.moe.balancers for block in layers_of(config) if str(block.ffn) == "moe"]
  pairs = list(zip(of(config), of(_read_back(family, values)), strict=True))
  lacking = lambda some, others: [m for m in some if not any(_same_method(m, other) for other in others)]
  if not any(lacking(ours, theirs) or lacking(theirs, ours) for ours, theirs in pairs):
    return ""
  text = lambda methods: ",".join(dict.fromkeys(map(spec_text, methods)))
  ours, theirs = (list(dict.fromkeys(map(text, side))) for side in zip(*pairs, strict=True))
  lost = text(method for pair in pairs for method in lacking(*pair)) or ours[0]
  right = f"--balancers={ours[0]}" if len(ours) == 1 else f"the balancers of its layers ({'; '.join(ours)})"
  return (
    f"save: config.json of {family.model_type} cannot hold balancers={lost}, and is loaded with balancers={theirs[0]}; "
    f"to continue this training, use {right} (in code: moe_jax.adapt.change_moe)"
  )


def dropping_line(config: ModelConfig, family: Family) -> str:
  """Returns the line about dropped tokens and noise of routers, which no config.json holds. Empty if the model has neither.

  Args:
    config: resolved.
    family: what the config.json is read with.
  """
  moes = [block.moe for block in layers_of(config) if str(block.ffn) == "moe"]
  flags = list(dict.fromkeys(_dropping_flags(moe) for moe in moes))
  if not any(flags):
    return ""
  effects = ["no token is dropped"] if any("--dispatcher" in text for text in flags) else []
  effects += ["routers have no noise in training"] if any(moe.jitter for moe in moes) else []
  right = (
    flags[0] if len(flags) == 1 else f"what its layers have ({'; '.join(t or 'nothing' for t in flags)})"
  )
  return (
    f"save: config.json of {family.model_type} is loaded with --dispatcher=dropless --jitter=0, so {' and '.join(effects)}; "
    f"to compute and train as before, use {right} (in code: moe_jax.adapt.change_moe)"
  )


def _dropping_flags(moe: MoEConfig) -> str:
  """The flags of a layer with experts by which it drops tokens or draws at the router; empty if it does neither."""
  names = []
  if not make_dispatcher(moe.dispatcher).never_drops:
    names += ["dispatcher", "capacity_factor", "eval_capacity_factor"]
    names += ["group_size"] if moe.group_size else []  # of tokens that share slots
  names += ["jitter"] if moe.jitter else []
  return " ".join(f"--{name}={spec_text(getattr(moe, name))}" for name in names)


def _same_method(one: Method, other: Method) -> bool:
  """Whether two methods are equal, up to how a number is rounded."""
  if one.factory is not other.factory or one.source != other.source:
    return False
  pairs = zip(dict(one.options).values(), dict(other.options).values(), strict=True)
  close = lambda a, b: isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-12)
  return all(a == b or close(a, b) for a, b in pairs)


def _read_back(family: Family, values: dict[str, Any]) -> ModelConfig:
  read = Values("config.json", values)
  return resolve(dataclasses.replace(family.read(read), mtp_depth=family.mtp_depth(read)))


def _differences(ours: ModelConfig, theirs: ModelConfig) -> Iterator[str]:
  """Yields what differs between two resolved configurations in what they compute."""
  for name in ("model_dim", "norm_eps", "tie_embeddings", "causal", "mtp_depth"):
    yield from _compare(name, getattr(ours, name), getattr(theirs, name))
  layers, others = layers_of(ours), layers_of(theirs)
  yield from _compare("the number of layers", len(layers), len(others))
  seen = set()
  for layer, pair in enumerate(zip(layers, others, strict=False)):
    if pair not in seen:
      seen.add(pair)
      for text in _block_differences(ours, theirs, *pair):
        yield f"{text} in layer {layer}"


def _compare(what: str, ours: Any, theirs: Any) -> Iterator[str]:
  if ours != theirs:
    yield f"{what} is {spec_text(theirs) if not isinstance(theirs, int | float) else theirs}, and here {ours}"


def _block_differences(
  ours: ModelConfig, theirs: ModelConfig, block: BlockConfig, other: BlockConfig
) -> Iterator[str]:
  ffn, other_ffn = str(block.ffn), str(other.ffn)
  yield from _compare("the feed-forward part", ffn, other_ffn)
  if ffn != other_ffn:
    return
  mine, its = _built(ours, block), _built(theirs, other)
  for part, what in (("mixer", "mixer"), ("mixer_residual", "residual"), ("ffn_residual", "residual")):
    if _structure(getattr(mine, part)) != _structure(getattr(its, part)):
      texts = str(getattr(other, what)), str(getattr(block, what))
      unlike = _first_unlike(getattr(mine, part), getattr(its, part))
      yield (
        f"{what} is {texts[0]}, and here {texts[1]}"
        if texts[0] != texts[1]
        else f"{what} {texts[0]} {unlike}"
      )
  if ffn != "moe":
    if _structure(mine.ffn) != _structure(its.ffn):
      yield f"the dense part differs ({ours.dense_dim}, {theirs.dense_dim})"
    return
  for name in _MOE_FIELDS:
    yield from _compare(name, getattr(block.moe, name), getattr(other.moe, name))
  if _structure(mine.ffn.shared) != _structure(its.ffn.shared):
    yield "the shared experts differ"


@functools.lru_cache(maxsize=256)
def _built(config: ModelConfig, block: BlockConfig) -> Block:
  """A block without values. How attention is computed does not count."""
  if block.mixer.takes("kernel"):
    block = dataclasses.replace(block, mixer=block.mixer.with_option("kernel", "auto"))
  return abstract(lambda: make_blocks(config, Segment((block,)), nnx.Rngs(0)))[0]


def _structure(module: nnx.Module | None) -> Any:
  """The static attributes of a module and the shapes of its variables, to be compared."""
  if module is None:
    return None
  graphdef, state = nnx.split(module)
  shapes = [(path, tuple(v.get_value().shape)) for path, v in nnx.to_flat_state(state)]
  return graphdef, shapes


def _first_unlike(ours: nnx.Module, theirs: nnx.Module) -> str:
  """What a module of a family has otherwise, where its name and options are the same."""
  mine, its = (dict(_structure(module)[1]) for module in (ours, theirs))
  for path, shape in mine.items():
    if its.get(path) != shape:
      name = ".".join(map(str, path))
      return f"has {list(its[path])} for {name} {list(shape)}" if path in its else f"has no {name}"
  return "has other settings"
