"""Before a run starts: does a part of a user's look at later tokens without saying so? Measured on a small model."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax

from moe_jax import sharding
from moe_jax.cluster import processes
from moe_jax.config import BlockConfig, ModelConfig
from moe_jax.disk import note
from moe_jax.errors import InputError, in_short
from moe_jax.nn.build import different_blocks, routed_part
from moe_jax.nn.causality import SMALL, SMALL_EXPERTS, influence
from moe_jax.nn.leaks import deciding_method, leak
from moe_jax.nn.own_parts import places, why_untried
from moe_jax.registry import Method

SEEN = 1e-3  # smaller changes of logits are rounding
_LENGTH = 64  # tokens of the sequences that are measured
_ROUTED = ("router", "experts", "shared_experts")


def check_own_leaks(config: ModelConfig) -> None:
  """Raises `InputError` if a part of a user's shows a token what comes after it in a causal model, and declares nothing.

  Each is measured in a model of one block, with parts of this package around it. Where such a model fails, one line says
  that the part was not checked, and so do results: see `sees_later_tokens`. Another says which part has failed on a tiny
  batch, so that nothing is known of it (`moe_jax.nn.own_parts`).

  Args:
    config: resolved.
  """
  for block in different_blocks(config) if processes.is_first() else ():
    for flag, method in (_own(block) | {"mixer": block.mixer, "residual": block.residual}).items():
      say_untried(flag, method)
    if config.causal and _own_dispatcher(block):
      method = block.moe.dispatcher
      _say(f"--dispatcher={method} ({places(method)}): whether it looks at later tokens is not checked")
  for own, small, block in _small_models(config):
    flag, text = deciding_method(block)
    may = f', or set leaks = "always" in its class and say --accept_leaks={text.partition(":")[0]}'
    _check(own, small, may if flag in own else "")


def say_untried(flag: str, method: Method) -> None:
  """Says in one line that a part of a user's has failed on a tiny batch, if it has."""
  if why := why_untried(method):
    _say(f"--{flag}={method} ({places(method)}): not tried before the run: a tiny batch fails ({why})")


def sees_later_tokens(config: ModelConfig) -> bool | None:
  """Returns whether a resolved model is causal, but its output for a token depends on later tokens.

  None: not known, because a part of a user's could not be measured, see `check_own_leaks`. Dispatchers never are.
  """
  if not config.causal:
    return False
  if any(leak(block) for block in different_blocks(config)):
    return True
  measured = [_measured(small) for _, small, _ in _small_models(config)]
  if any(change > SEEN for change, _ in measured):
    return True
  is_unknown = any(failed for _, failed in measured) or any(map(_own_dispatcher, different_blocks(config)))
  return None if is_unknown else False


def _small_models(config: ModelConfig) -> Iterator[tuple[dict[str, Method], ModelConfig, BlockConfig]]:
  """(parts of a user's by flag, the small model that they are measured in, their block), of a causal model."""
  for block in different_blocks(config) if config.causal else ():
    if block.mixer.source:
      yield {"mixer": block.mixer}, _with_mixer(config, block.mixer), block
    if block.residual.source:
      yield {"residual": block.residual}, ModelConfig(residual=block.residual, ffn="mlp", **SMALL), block
    own = _own(block)
    if own and not leak(block):
      yield own, _with_ffn(config, block), block


def _own(block: BlockConfig) -> dict[str, Method]:
  """Returns the parts of a user's in the feed-forward part of a block, by flag."""
  parts = {"ffn": block.ffn}
  if routed_part(block) is not None:
    parts |= {name: getattr(block.moe, name) for name in _ROUTED}
  return {name: method for name, method in parts.items() if method.source}


def _own_dispatcher(block: BlockConfig) -> bool:
  """Returns whether a block routes tokens by a dispatcher of a user's."""
  return routed_part(block) is not None and bool(block.moe.dispatcher.source)


def _with_mixer(config: ModelConfig, mixer: Method) -> ModelConfig:
  """A small model with the mixer, whose heads share keys and values as in `config`, and without experts."""
  kv = min(config.num_kv_heads, 2)
  heads = config.num_heads // config.num_kv_heads * kv
  sizes = SMALL | {"num_heads": heads, "num_kv_heads": kv, "model_dim": heads * SMALL["head_dim"]}
  return ModelConfig(mixer=mixer, ffn="mlp", qk_norm=config.qk_norm, **sizes)


def _with_ffn(config: ModelConfig, block: BlockConfig) -> ModelConfig:
  """A small model with the feed-forward part. Its experts drop assignments if they may."""
  layer = routed_part(block)
  dispatcher = "sorted" if layer is not None and not layer.dispatcher.never_drops else "dropless"
  width = {"shared_expert_dim": min(block.moe.shared_expert_dim, 8)}
  moe = dataclasses.replace(block.moe, dispatcher=dispatcher, group_size=0, **SMALL_EXPERTS, **width)
  return ModelConfig(ffn=block.ffn, moe=moe, activation=config.activation, **SMALL)


def _check(own: Mapping[str, Method], small: ModelConfig, may: str = "") -> None:
  names = ", ".join(f"--{flag}={method}" for flag, method in own.items())
  at = places(*own.values())
  change, failed = _measured(small)
  if failed and processes.is_first():
    _say(
      f"{names} ({at}): whether it looks at later tokens is not checked: a small model with it fails ({failed})"
    )
  if change > SEEN:
    raise InputError(
      f"{names} ({at}): its output for a token depends on later tokens (measured on a small model: they change logits "
      f"by {change:.2g}), which a causal model must not see, and it does not declare it; mend it{may}, or train another "
      "objective with --objective=masked_lm"
    )


@functools.lru_cache(maxsize=256)
def _measured(config: ModelConfig) -> tuple[float, str]:
  """Returns the influence of later tokens, and, if it cannot be measured, 0 and the error. On a CPU, without a mesh."""
  try:
    with on_cpu():
      # A part may do one thing in training and another in evaluation, of which all results are.
      return max(influence(config, length=_LENGTH, train=train) for train in (True, False)), ""
  except Exception as error:  # of a user's code: any
    return 0.0, in_short(error)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
  """On a CPU alone, whatever mesh is in use."""
  cpu = jax.local_devices(backend="cpu")[0]  # JAX_PLATFORMS may leave it out
  mesh = jax.sharding.Mesh([[[[[cpu]]]]], sharding.MESH_AXES)
  with jax.set_mesh(mesh), jax.default_device(cpu):
    yield


_say = functools.cache(note)  # once, though every arm and seed asks
