"""Parameters with logical axes, and the variable type of balancer state."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.sharding import gathered

T = TypeVar("T")
_draw: contextvars.ContextVar[Callable[[tuple[int, ...]], jax.Array] | None] = contextvars.ContextVar(
  "_draw", default=None
)


def abstract(make: Callable[[], T]) -> T:
  """Returns the module, or modules, that `make` makes, with shapes and types in place of values. Nothing is computed.

  Tracing what draws values would take most of the time, so `matrix` draws none.
  """
  found: list[T] = []
  with matrices_of(jnp.zeros):
    jax.eval_shape(lambda: found.append(make()))
  return found[0]


@contextlib.contextmanager
def matrices_of(draw: Callable[[tuple[int, ...]], jax.Array] | None) -> Iterator[None]:
  """Lets `matrix` make what `draw(shape)` returns. None: values as documented, whatever surrounds this.

  Zeros are for shapes alone. What is computed with must have other values: a part may divide by the norm of a matrix.
  """
  token = _draw.set(draw)
  try:
    yield
  finally:
    _draw.reset(token)


def constants(std: float) -> Callable[[tuple[int, ...]], jax.Array]:
  """Returns what draws a matrix by its shape alone, for `matrices_of` in a trial.

  They are constants: to compile JAX's draws takes longer than the rest of a trial.
  """
  return lambda shape: jnp.asarray(std * np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def weight(param: nnx.Param, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """Returns the value of a parameter for a product: in `dtype`, and gathered if it is stored split (fsdp)."""
  return gathered(param[...].astype(dtype), param.get_metadata()["logical_axes"])


def plus(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Returns `x` plus a float32 bias of its last axes, in the type of `x`.

  The sum is in float32, so the gradient of the bias is, too: it is a sum over all tokens.
  """
  axes = range(x.ndim - bias.ndim)
  return (x + jnp.expand_dims(bias, tuple(axes))).astype(x.dtype)


def per_variable(function: Callable[[nnx.Variable], object]) -> Callable[[nnx.State], nnx.State]:
  """Returns a function that maps a state to `function(variable)`, for the masks and labels of optax."""
  is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
  return lambda params: jax.tree.map(lambda v: v.replace(function(v)), params, is_leaf=is_variable)


def values_of(module: nnx.Module) -> list[tuple[tuple, nnx.Variable, list[jax.Array]]]:
  """Returns (path, variable, arrays now) of each variable of a module: see `moe_jax.nn.checks.check_kept`.

  Of parameters, too. A network that gives one inside of it others for one call gives them to a copy.
  """
  found = ((path, leaf) for path, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Variable))
  return [(path, x, jax.tree.leaves(x.get_value())) for path, x in found]


def matrix_sizes(module: nnx.Module) -> list[tuple[tuple, int, tuple[str, ...]]]:
  """(path, elements, logical axes) of each parameter of a module, abstract or not, that something is multiplied by.

  `matrix` made it, whatever its number of axes, or something other than `vector` with two or more beside "expert".
  """
  found = []
  for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
    metadata = variable.get_metadata()
    axes = metadata["logical_axes"]
    plain = metadata.get("decays", True) and sum(axis != "expert" for axis in axes) > 1
    if "num_in" in metadata or plain:
      found.append((path, math.prod(variable.get_value().shape), axes))
  return found


class BalancerState(nnx.Variable):
  """State of a balancer.

  It has no gradient, the optimizer does not see it, and it changes once per optimizer step.
  """


def freeze(module: nnx.Module) -> nnx.Module:
  """Marks every parameter of `module` as frozen, so that the optimizer does not change it.

  Returns the module.
  """
  for _, leaf in nnx.iter_graph(module):
    if isinstance(leaf, nnx.Param):
      leaf.set_metadata(group="frozen")
  return module


def matrix(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  scale: float = 1.0,
  num_in: int = 1,
  zero: bool = False,
) -> nnx.Param:
  """Returns a float32 parameter with std sqrt(scale / fan_in), truncated at two standard deviations.

  Its metadata keeps `num_in`, by which an optimizer knows rows from columns.

  Args:
    rngs: draws the values.
    shape: the shape of the parameter.
    axes: a logical axis (`moe_jax.sharding.RULES`) for each dimension. Axes named "expert" are batch axes.
    scale: the variance is scale / fan_in. Switch (2101.03961, section 2.4) uses 0.1.
    num_in: how many of the other axes, from the left, are inputs.
    zero: whether to start at zero instead.
  """
  draw = jnp.zeros if zero else _draw.get()
  if draw is not None:
    return nnx.Param(draw(shape).astype(jnp.float32), logical_axes=axes, num_in=num_in)
  batch = tuple(i for i, name in enumerate(axes) if name == "expert")
  rest = [i for i in range(len(shape)) if i not in batch]
  init = jax.nn.initializers.variance_scaling(
    scale,
    "fan_in",
    "truncated_normal",
    in_axis=rest[:num_in],
    out_axis=rest[num_in:],
    batch_axis=batch,
  )
  return nnx.Param(init(rngs.params(), shape, jnp.float32), logical_axes=axes, num_in=num_in)


def vector(values: jax.Array, axes: tuple[str, ...]) -> nnx.Param:
  """Returns a float32 parameter that starts at `values`, such as a bias or a temperature.

  Its metadata keeps `decays=False`: the weight decay of an optimizer leaves it alone, whatever its shape.

  Args:
    values: of any shape.
    axes: a logical axis (`moe_jax.sharding.RULES`) for each dimension; () for a scalar.
  """
  return nnx.Param(jnp.asarray(values, jnp.float32), logical_axes=axes, decays=False)
