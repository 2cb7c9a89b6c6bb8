"""Tries the parts of a user on a tiny batch, before anything is compiled or trained.

Tests check the parts of this package, so nothing of it is tried.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import BlockConfig, ModelConfig
from moe_jax.errors import InputError, in_short
from moe_jax.fingerprint import place
from moe_jax.nn.block import Block
from moe_jax.nn.checks import check_kept, check_routing, type_name
from moe_jax.nn.context import Context
from moe_jax.nn.experts import ExpertNetwork
from moe_jax.nn.moe import MoE
from moe_jax.nn.routers import MergedTopK, Router
from moe_jax.nn.variables import matrices_of, values_of
from moe_jax.ops.balancing import balancer_of
from moe_jax.registry import Method
from moe_jax.types import Array, RouterContext, Routing

_GROUPS, _DIM, _TOKENS, _PADDING = 2, 8, 64, 3
_LENGTH = 1024  # of sequences that are only traced: a multiple of usual chunks
_RESIDUALS = (("residual", "mixer_residual"), ("residual", "ffn_residual"))


def check_router(method: Method, balancers: tuple[Method, ...], layer: MoE) -> None:
  """Raises `InputError` if a router of the layer's sizes breaks what `Router` and `Routing` promise.

  It routes a tiny batch, in training and in evaluation. Found are wrong shapes and types, state that would be lost, ids
  out of range, the same expert twice, padding that is sent, and numbers that are not finite.
  """
  what, e = f"router {method.name}", layer.num_experts
  t = _TOKENS * math.ceil(e / _TOKENS)  # where experts choose, each finds tokens
  sizes = {"dim": _DIM, "num_experts": e, "num_experts_per_token": layer.num_experts_per_token}
  mask_GT = np.ones((_GROUPS, t), bool)
  mask_GT[-1, -_PADDING:] = False
  index_GT = np.tile(np.arange(t, dtype=np.int32), (_GROUPS, 1))

  # Not jitted: the few small operations compile faster one by one, and the next router finds most of them compiled.
  with trial([method]), jax.ensure_compile_time_eval():
    key, balancer = jax.random.key(0), balancer_of(balancers)
    router = method(**sizes, init_scale=1.0, rngs=nnx.Rngs(key))
    x_GTD = jnp.asarray(np.random.default_rng(0).normal(size=(_GROUPS, t, _DIM)), jnp.float32)
    evaluation = RouterContext(
      mask=jnp.asarray(mask_GT),
      bias_E=balancer.bias(balancer.init(layer.num_scored_experts)),
      token_id=jnp.asarray(index_GT % 8),
      sequence=jnp.asarray(index_GT * 2 // t),
      domain=jnp.zeros((_GROUPS, t), jnp.int32),
      layer_input=x_GTD,
    )
    training = evaluation._replace(train=True, key=jax.random.split(key, _GROUPS))
    for context in (training, evaluation):
      before = values_of(router)
      routing = router(x_GTD, context)
      check_routing(what, router, routing, x_GTD.shape, e)
      check_kept(what, before)
      _check_values(what, jax.device_get(routing), mask_GT, may_repeat=isinstance(router, MergedTopK))


def _check_values(what: str, routing: Routing, mask_GT: np.ndarray, may_repeat: bool) -> None:
  """Raises `InputError` if numbers of a routing are wrong. Its shapes are right."""
  (g, t, e), a = routing.logits_TE.shape, routing.assignment
  for name, ids_GA, limit in (("expert_A", a.expert_A, e), ("token_A", a.token_A, t)):
    if ids_GA.size and not 0 <= ids_GA.min() <= ids_GA.max() < limit:
      seen = f"{ids_GA.min()} to {ids_GA.max()}"
      raise InputError(f"{what}: {name} has ids from {seen}; they must be from 0 to {limit - 1}")
  if (routing.mask_T != mask_GT).any():
    raise InputError(f"{what}: mask_T differs from context.mask; return that one")
  group_GA = np.broadcast_to(np.arange(g)[:, None], a.token_A.shape)
  if (a.valid_A & ~mask_GT[group_GA, a.token_A]).any():
    raise InputError(f"{what}: sends padding to experts; valid_A must be False where context.mask is")
  sent_GTE = np.zeros((g, t, e), int)
  np.add.at(sent_GTE, tuple(index_GA[a.valid_A] for index_GA in (group_GA, a.token_A, a.expert_A)), 1)
  if sent_GTE.max(initial=0) > 1 and not may_repeat:
    raise InputError(
      f"{what}: sends a token to the same expert twice; valid entries must be of different ones"
    )
  if not np.isfinite(a.weight_A[a.valid_A]).all():
    raise InputError(f"{what}: weight_A has values that are not finite in valid entries")
  for name in ("logits_TE", "log_scores_TE"):
    if np.isnan(getattr(routing, name)[mask_GT]).any():
      raise InputError(f"{what}: {name} has NaN for tokens that are no padding")


def check_axes(config: BlockConfig, block: Block) -> None:
  """Raises `InputError` unless each parameter of a block has a logical axis for each dimension.

  Sharding, weight decay, Muon and the counts of parameters read the axes. Experts are split along their first one.
  """
  for path, leaf in nnx.iter_graph(block):
    if not isinstance(leaf, nnx.Variable):
      continue
    kind, method, name = _part_at(config, block, path)
    if not isinstance(leaf, nnx.Param) and kind != "experts":
      continue
    axes, ndim = leaf.get_metadata().get("logical_axes"), jnp.ndim(leaf.get_value())
    what = f"{kind} {method.name}: parameter {name}"
    if axes is None:
      raise InputError(f"{what} has no logical axes; make it with moe_jax.matrix or moe_jax.vector")
    if len(axes) != ndim:
      raise InputError(f"{what} has {ndim} dimensions and {len(axes)} logical axes; name one for each")
    if kind == "experts" and axes[0] != "expert":
      raise InputError(f"{what} has the logical axes {', '.join(map(str, axes))}; the first must be expert")


def check_forward(model: ModelConfig, config: BlockConfig, make: Callable[[], Block]) -> None:
  """Raises `InputError` if a user's part changes its variables in the forward pass, or the shape or type of x_BLD.

  Nothing is computed. A feed-forward part is traced if it, its router or its experts are a user's. A residual of a user's is
  traced around a part that returns what it is given.

  Args:
    model, config: resolved.
    make: makes the block.
  """
  moe = config.moe
  parts = {"mixer": (config.mixer,), "ffn": (config.ffn, moe.router, moe.experts, moe.shared_experts)}
  parts["residual"] = (config.residual,)
  own = {kind: [method for method in methods if method.source] for kind, methods in parts.items()}
  batch = (_GROUPS, moe.group_size or _LENGTH)

  def forward(seed: Array) -> None:
    block, key = make(), jax.random.key(seed)
    context = Context(
      mask_BL=jnp.ones(batch, bool),
      key_B=jax.random.split(key, _GROUPS),
      step_key=key,
      token_id_BL=jnp.zeros(batch, jnp.int32),
      domain_B=jnp.zeros(_GROUPS, jnp.int32),
      train=True,
    )
    x_BLD = jnp.zeros((*batch, model.model_dim), model.compute_dtype)
    for kind, part in (("mixer", "mixer"), ("ffn", "ffn"), *_RESIDUALS):
      if not own[kind]:
        continue
      before, what = values_of(getattr(block, part)), f"{kind} {getattr(config, kind).name}"
      if kind == "residual":
        _check_residual(what, getattr(block, part), x_BLD, context)
      else:
        _check_output(what, getattr(block, part)(x_BLD, context), x_BLD)
      for path, variable, value in before:
        inner, method, name = _part_at(config, block, (part, *path))
        check_kept(f"{inner} {method.name}", [(name, variable, value)])

  if any(own.values()):
    with (
      trial(method for methods in own.values() for method in methods),
      matrices_of(jnp.zeros),
      jax.default_device("cpu"),
    ):  # which needs no kernel of its own
      jax.eval_shape(forward, 0)


def _check_residual(what: str, residual: nnx.Module, x_BLD: Array, context: Context) -> None:
  aux = {"sum": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)}  # of the part; any tree
  output = residual(lambda x_BLD, context: (x_BLD, aux), x_BLD, context)
  _check_output(what, output, x_BLD, "x_BLD", "the aux of the part")
  described = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
  if described(output[1]) != described(aux):
    raise InputError(
      f"{what}: returns {'no' if output[1] is None else 'another'} aux; it must return that of the part, unchanged"
    )


def _check_output(what: str, output: Any, x_BLD: Array, y: str = "y_BLD", aux: str = "aux or None") -> None:
  if not isinstance(output, tuple) or len(output) != 2:
    raise InputError(
      f"{what}: returns a value of type {type_name(output)}; it must return a pair: {y}, and {aux}"
    )
  y_BLD = output[0]
  # The sum of both goes to the next block, and a loop over layers carries no other type.
  if jnp.shape(y_BLD) != x_BLD.shape or jnp.result_type(y_BLD, x_BLD) != x_BLD.dtype:
    now, x = (f"{jnp.result_type(value)}{list(jnp.shape(value))}" for value in (y_BLD, x_BLD))
    raise InputError(f"{what}: returns {y} of {now} for x_BLD of {x}; it must have the same shape and type")


def _part_at(config: BlockConfig, block: Block, path: tuple[Any, ...]) -> tuple[str, Method, str]:
  """Returns which part of a block has the variable at `path`, its method, and the variable's name in it."""
  module: Any = block
  parts = {Router: "router", ExpertNetwork: "experts"}
  for i, name in enumerate(path):
    is_shared = name == "shared" and isinstance(module, MoE)
    module = module[name] if isinstance(name, int) else getattr(module, name)
    kind = next((kind for base, kind in parts.items() if isinstance(module, base)), None)
    kind = "shared_experts" if is_shared else kind
    if kind and path[0] == "ffn":
      return kind, getattr(config.moe, kind), ".".join(map(str, path[i + 1 :]))
  kind = "residual" if str(path[0]).endswith("_residual") else str(path[0])
  return kind, getattr(config, kind), ".".join(map(str, path[1:]))


def places(*methods: Method) -> str:
  """Returns where the code of a user's in methods is."""
  return ", ".join(dict.fromkeys(place(factory) for method in methods for factory in method.own_factories))


_UNTRIED: dict[Method, str] = {}


def why_untried(method: Method) -> str:
  """Returns the error of a trial with a part of a user's, which says nothing of it; "" if there was none."""
  return _UNTRIED.get(method, "")


@contextlib.contextmanager
def trial(methods: Iterable[Method]) -> Iterator[None]:
  """Without the mesh in use, which need not divide a tiny batch, and with matrices that have values.

  Only an `InputError` ends a trial that fails: a part may be right and not take the sizes of the trial. If it is not, the
  program of the run meets the same error. `why_untried` has it for each of the methods.
  """
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), matrices_of(None):
    try:
      yield
    except InputError:
      raise
    except Exception as error:  # of a user's code, which may raise any
      _UNTRIED.update(dict.fromkeys(methods, in_short(error)))
