"""Tries experts of a user's own: on empty slots, and in parts, as devices that each have some of the hidden units do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.errors import InputError, in_short
from moe_jax.fingerprint import is_builtin, place
from moe_jax.nn.experts import ExpertNetwork
from moe_jax.nn.experts.base import as_experts
from moe_jax.nn.own_parts import places, trial
from moe_jax.nn.variables import constants, matrices_of
from moe_jax.ops.experts import Axes, Batched, Experts, PartOfSum, Product, WithRowBits
from moe_jax.registry import Method
from moe_jax.sharding import RULES
from moe_jax.types import Array, PyTree

_DIM, _ROWS, _EXPERTS = 8, 4, 2
_SEEN = 0.02  # of the size of the outputs; smaller differences may be rounding, of a network in bfloat16, too


def check_empty_slots(method: Method, expert_dim: int) -> None:
  """Raises `InputError` if experts of a user's own are finite for rows of numbers, but not for rows of zeros.

  Such are the slots of an expert that no token fills. Their combine weight is 0, and 0 times NaN is NaN: one empty slot
  would spoil the output, or the gradient, of the whole layer. Few rows are computed, on a CPU.

  Args:
    method: resolved, of a user's own, or with one inside.
    expert_dim: F of the run.
  """
  with trial([method]):
    _check_empty_slots(method, expert_dim)


@functools.lru_cache(maxsize=256)
def _check_empty_slots(method: Method, expert_dim: int) -> None:
  with matrices_of(constants(0.1)), jax.default_device("cpu"), jax.ensure_compile_time_eval():
    experts, rows_EMD, product, _ = _tiny(method, _EXPERTS, expert_dim)
    compute = lambda rows, weights: dataclasses.replace(experts, weights=weights)(rows, product)
    if not _is_finite(compute(rows_EMD, experts.weights)):
      return  # of any row, so empty slots are not the reason
    y_EMD, gradient = jax.vjp(compute, jnp.zeros_like(rows_EMD), experts.weights)
    found = {"output": y_EMD, "gradient": gradient(jnp.zeros_like(y_EMD))}  # the combine weight is 0
  for name, values in found.items():
    if not _is_finite(values):
      raise InputError(
        f"experts {method.name} ({places(method)}): the {name} is not finite for rows of zeros, which the empty slots of an "
        "expert are for some dispatchers (einsum), so it must be finite there, too: e.g. add an epsilon to what it divides by"
      )


def _is_finite(values: PyTree) -> bool:
  real = [x for x in jax.tree.leaves(values) if jnp.issubdtype(x.dtype, jnp.floating)]
  return all(np.isfinite(np.asarray(x, np.float32)).all() for x in real)


def check_cut(moe: MoEConfig, network: ExpertNetwork, parts: int) -> None:
  """Raises `InputError` if experts of a user's own, cut into parts of the hidden units, do not add up to the whole.

  Dispatchers that write out the exchange compute them like this with tensor parallelism. A network that mixes hidden units,
  such as a norm over them, would get other numbers on each mesh. Few rows are computed, on a CPU. Where they cannot be,
  nothing is known of the numbers, and the experts are refused, too.

  Args:
    moe: resolved; it names the experts.
    network: the same, without values.
    parts: into which hidden units are cut.
  """
  inside = [module for _, module in nnx.iter_modules(network) if isinstance(module, ExpertNetwork)]
  if parts > 1 and not all(is_builtin(type(module)) for module in inside):
    _check_cut(moe.experts, moe.num_experts, moe.expert_dim, parts)


@functools.lru_cache(maxsize=256)
def _check_cut(method: Method, num_experts: int, expert_dim: int, parts: int) -> None:
  what = f"experts {method.name} ({place(method.factory)})"
  advice = "use the dispatcher sorted or einsum, or no tensor parallelism"
  with (
    jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())),
    matrices_of(None),
    jax.default_device("cpu"),
    jax.ensure_compile_time_eval(),
  ):
    how = "on a tiny batch"
    try:
      experts, rows_EMD, product, draw = _tiny(method, num_experts, expert_dim)
      weights = (_uneven(w, axes, draw) for w, axes in zip(experts.weights, experts.axes, strict=True))
      experts = dataclasses.replace(experts, weights=tuple(weights))
      whole_EMD = np.asarray(experts(rows_EMD, product))
      how = f"with its hidden units in {parts} parts"
      part_of_sum = PartOfSum(product, parts)
      found_EMD = sum(np.asarray(part(rows_EMD, part_of_sum)) for part in _cut(experts, parts))
    except InputError:
      raise
    except Exception as error:  # of a user's code, which may raise any. Nothing would be known of the numbers
      raise InputError(f"{what}: fails {how} ({in_short(error)}); {advice}") from None
  size = np.linalg.norm(whole_EMD)
  if not (np.isfinite(size) and size > 0):
    raise InputError(
      f"{what}: nothing is known of it in {parts} parts: on a tiny batch it is {size:g}; {advice}"
    )
  change = np.linalg.norm(found_EMD - whole_EMD) / size
  if not change <= _SEEN:
    raise InputError(
      f"{what}: its hidden units in {parts} parts (tensor) do not add up to the whole (off by {change:.2g} of its size); where "
      f"it mixes hidden units, {advice}; otherwise, name their axis mlp, and divide what no hidden unit has by product.parts"
    )


def _tiny(
  method: Method, num_experts: int, expert_dim: int
) -> tuple[Experts, Array, Product, np.random.Generator]:
  """Returns experts with the hidden units of the run for narrow rows, such rows, a product for them, and what draws."""
  sizes = {"num_experts": num_experts, "dim": _DIM, "expert_dim": expert_dim}
  draw, key = np.random.default_rng(0), jax.random.key(0)
  network = method(**sizes, init_scale=1.0, rngs=nnx.Rngs(key)).for_step(key)
  experts = as_experts(network, jnp.float32, gather=False)
  shape = num_experts, _ROWS
  rows_EMD = jnp.asarray(draw.normal(size=(*shape, _DIM)), jnp.float32)
  product: Product = Batched()
  if network.draws:
    product = WithRowBits(product, jnp.asarray(draw.integers(2**32, size=shape, dtype=np.uint32)))
  return experts, rows_EMD, product, draw


def _is_hidden(axis: str | None) -> bool:
  return RULES.get(axis) == RULES["mlp"]


def _uneven(w: Array, axes: Axes, draw: np.random.Generator) -> Array:
  """Returns weights of which parts differ in size, and none are alike, such as biases that begin at 0."""
  if not jnp.issubdtype(w.dtype, jnp.floating):
    return w
  if (w == w.ravel()[0]).all():
    w = w + jnp.asarray(abs(draw.normal(size=w.shape)), w.dtype)  # a scale stays above 0
  for i, axis in enumerate(axes):
    if _is_hidden(axis):
      rise = jnp.linspace(0.5, 2, w.shape[i], dtype=w.dtype)
      w = w * jnp.expand_dims(rise, [j for j in range(w.ndim) if j != i])
  return w


def _cut(experts: Experts, parts: int) -> list[Experts]:
  """Returns what each of the devices has that share the hidden units."""

  def pieces(w: Array, axes: Axes) -> list[Array]:
    hidden = [i for i, axis in enumerate(axes) if _is_hidden(axis)]
    return jnp.split(w, parts, axis=hidden[0]) if hidden else [w] * parts

  cut = [pieces(w, axes) for w, axes in zip(experts.weights, experts.axes, strict=True)]
  return [dataclasses.replace(experts, weights=weights) for weights in zip(*cut, strict=True)]
