"""Low-rank adapters on frozen matrices (LoRA, 2106.09685), for experts and mixers alike."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.checks import check_kept
from moe_jax.nn.variables import freeze, matrix, values_of
from moe_jax.types import Array

T = TypeVar("T")


class Adapters(nnx.Module):
  """A trained addition to every matrix W of a frozen module: W + alpha / rank * A B.

  A starts random and B at zero, so the module starts as it is (2106.09685, section 4.1). The sum is computed in every
  forward pass, which works for any module and costs `rank` products per weight.

  Args:
    module: its own parameters that `matrix` made get adapters. It is frozen.
    rank, alpha: see above.
    what: of the module, for errors.
    rngs: draws A.

  Raises:
    InputError: if `rank` is less than 1, or the module has no matrices of its own.
  """

  def __init__(self, module: nnx.Module, rank: int, alpha: float, what: str, *, rngs: nnx.Rngs):
    if rank < 1:
      raise InputError(f"{what}: rank must be at least 1, got {rank}")
    self.scale, self.what = alpha / rank, what
    freeze(module)
    down, up = {}, {}
    for name, w in vars(module).items():
      if not isinstance(w, nnx.Param) or "num_in" not in w.get_metadata():
        continue
      axes, shape = w.get_metadata()["logical_axes"], w.get_value().shape
      batch = axes[:1] == ("expert",)
      split = batch + w.get_metadata()["num_in"]
      down[name] = matrix(rngs, (*shape[:split], rank), (*axes[:split], "rank"), num_in=split - batch)
      up_axes, up_shape = (*axes[:batch], "rank", *axes[split:]), (*shape[:batch], rank, *shape[split:])
      up[name] = matrix(rngs, up_shape, up_axes, zero=True)
    if not down:
      raise InputError(
        f"{what}: has no matrices of its own; adapters go inside, e.g. expert_dropout:experts=low_rank"
      )
    self.down, self.up = nnx.Dict(down), nnx.Dict(up)

  def apply(self, module: nnx.Module, function: Callable[[nnx.Module], T]) -> T:
    """Returns `function` of `module`, of which nothing is trained, with the sums in place of its matrices.

    Raises:
      InputError: if `function` changes its variables, which are those of a copy.
    """
    graphdef, state = nnx.split(module)
    adapted = nnx.merge(graphdef, jax.lax.stop_gradient(state))
    for name in self.down:
      w = getattr(adapted, name)
      batched = w.get_metadata()["logical_axes"][:1] == ("expert",)
      w.set_value(w[...] + addition(self.down[name][...], self.up[name][...], self.scale, batched))
    before = values_of(adapted)
    result = function(adapted)
    check_kept(self.what, before)
    return result


def addition(down: Array, up: Array, scale: float, batched: bool) -> Array:
  """Returns `scale` A B of one matrix, or with a leading axis `batched` of each: [.., in, r], [.., r, out] -> [.., in, out]."""
  product = lambda a, b: jnp.tensordot(a, b, axes=1)
  return scale * (jax.vmap(product) if batched else product)(down, up)
