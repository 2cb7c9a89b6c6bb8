"""Finds blocks whose output for a token depends on later tokens, or on the domain of the text.

A causal model refuses the first, unless accepted by name.
"""

from moe_jax.config import BlockConfig, ModelConfig
from moe_jax.errors import InputError, unknown_name
from moe_jax.nn.build import abstract_ffn, different_blocks, routed_part
from moe_jax.nn.ffn import FFNS
from moe_jax.nn.routers import ROUTERS
from moe_jax.registry import split_methods


def leak(block: BlockConfig) -> str:
  """Returns when the output of a resolved block depends on later tokens.

  The result is "" for never, "drops" for only if capacity drops assignments, or "always".
  """
  routed = routed_part(block)
  if routed is None:
    return getattr(abstract_ffn(block), "leaks", "")
  leaks = routed.router.leaks
  return "" if leaks == "drops" and routed.dispatcher.never_drops else leaks


def deciding_method(block: BlockConfig) -> tuple[str, str]:
  """Returns (flag, text) of the method that decides which tokens an expert of a resolved block gets."""
  return ("ffn", str(block.ffn)) if routed_part(block) is None else ("router", str(block.moe.router))


def router_of_domain(config: ModelConfig) -> str:
  """Returns the text of a router of a resolved model that reads the domain of each sequence; empty if there is none."""
  parts = ((block, routed_part(block)) for block in different_blocks(config))
  return next((str(block.moe.router) for block, part in parts if part and part.router.num_tasks), "")


def check_causal(config: ModelConfig) -> None:
  """Raises `InputError` if outputs depend on later tokens, unless `accept_leaks` names the method."""
  for block in different_blocks(config):
    for name in split_methods(block.moe.accept_leaks):
      if name not in ROUTERS and name not in FFNS:
        raise InputError(f"--accept_leaks={name}: {unknown_name('router', name, [*ROUTERS, *FFNS])}")
  for block in different_blocks(config) if config.causal else ():
    when = leak(block)
    flag, text = deciding_method(block)
    name = text.partition(":")[0]
    if not when or name in split_methods(block.moe.accept_leaks):
      continue
    where = " where capacity drops assignments (--dispatcher=dropless drops none)" if when == "drops" else ""
    raise InputError(
      f"--{flag}={text}: in a causal model its output depends on later tokens{where}; to train it nonetheless, say "
      f"--accept_leaks={name}, or train another objective with --objective=masked_lm"
    )
