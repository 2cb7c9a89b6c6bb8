"""Sparse upcycling: makes experts of the dense feed-forward parts of a trained model (2212.05055)."""

import dataclasses
import functools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.adapt.layers import Layer, put_together, take_apart, with_blocks
from moe_jax.config import BlockConfig, ModelConfig, MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn.build import resolve_moe, routed_layer
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.ffn import FFNS
from moe_jax.nn.leaks import check_causal
from moe_jax.nn.parts import made
from moe_jax.nn.routers import ROUTERS
from moe_jax.nn.routers.base import Router
from moe_jax.nn.transformer import Transformer
from moe_jax.types import RouterContext

_MATRICES = {"w_gate_DF": "w_gate_EDF", "w_up_DF": "w_up_EDF", "w_down_FD": "w_down_EFD"}


def upcycle(
  model: Transformer,
  moe: MoEConfig,
  *,
  layers: Iterable[int] | None = None,
  shuffle: bool = False,
  reinit: float = 0.0,
  noise: float = 0.0,
  router_scale: float = 1.0,
  scale: float | None = None,
  seed: int = 0,
) -> Transformer:
  """Returns `model` with routed experts in place of dense feed-forward parts. All else is copied.

  The hidden units of the dense part are repeated as often as needed and cut into E experts of `moe.expert_dim`
  units each. With `expert_dim` equal to the dense width, experts are copies (2212.05055). With half of it, two
  experts are the halves of one copy, and so on (2407.10671, section 2.2.1). Experts of one copy then begin with equal
  columns in the router, so a token that takes one takes all of them, if K is a multiple of their number (2410.07524,
  virtual groups).

  Args:
    model: has MLP blocks.
    moe: the layers to make. `experts` must be the network that the dense parts are.
    layers: the numbers of the layers to change, from 0; None: all dense ones.
    shuffle: whether to shuffle the hidden units of each copy before it is cut, as in Qwen2.
    reinit: the share of hidden units of each expert that get new values, drawn with the standard deviation of the
      matrix. Qwen2 has 0.5 (2407.10671); it does not say whether by unit or by entry, and we follow 2502.19261.
    noise: standard deviation of noise added to every matrix, in standard deviations of the matrix.
    router_scale: multiplies the initial router. 0: a router of zeros.
    scale: multiplies the output matrix. None: what makes the layer equal to the dense part while all logits are equal
      and `reinit` and `noise` are 0. That is (dense width / expert_dim) / (sum of a token's weights). If the weights
      always have one sum, the layers are equal whatever the logits. 1 copies as they are: with a router that does
      not renormalise, the layer then begins at K / E of the dense part.
    seed: of all draws.

  Raises:
    InputError: if there is no dense layer, a number is out of range, or `moe` does not fit.
  """
  if not 0 <= reinit <= 1:
    raise InputError(f"upcycle: reinit is a share of hidden units, between 0 and 1, got {reinit}")
  if noise < 0 or router_scale < 0:
    raise InputError(f"upcycle: noise and router_scale must be 0 or more, got {noise} and {router_scale}")
  parts = take_apart(model)
  config = parts.config
  moe = check_upcycle(config, moe, scale)
  sum_of_weights = _sum_of_weights(moe) if scale is None else None
  make = functools.partial(
    _upcycled,
    moe=moe,
    shuffle=shuffle,
    reinit=reinit,
    noise=noise,
    router_std=router_scale * (config.init_scale / config.model_dim) ** 0.5,
    scale=lambda dense_dim: dense_dim / moe.expert_dim / sum_of_weights if scale is None else scale,
  )
  chosen = _chosen(parts.layers, layers)
  new = [
    make(layer, rng=np.random.default_rng((seed, i))) if i in chosen else _with_moe(layer, moe)
    for i, layer in enumerate(parts.layers)
  ]
  return put_together(parts._replace(layers=tuple(new)), seed)


def check_upcycle(config: ModelConfig, moe: MoEConfig, scale: float | None = None) -> MoEConfig:
  """Returns `moe`, resolved, if `upcycle` makes such layers of a dense model. Needs no model, only its configuration.

  Args:
    config: of the dense model, resolved.
    moe, scale: see `upcycle`.

  Raises:
    InputError: if they do not fit together.
  """
  moe.check()
  moe = resolve_moe(moe)
  if moe.experts != EXPERTS.resolve(config.activation):
    raise InputError(
      f"--experts={moe.experts}: the dense parts are {config.activation}; choose experts={config.activation}"
    )
  if moe.num_shared_experts:
    raise InputError(
      f"--num_shared_experts={moe.num_shared_experts}: upcycle makes routed experts only; choose 0"
    )
  if routed_layer(moe).router.weighs == "input":  # and whether parts fit together
    raise InputError(
      f"--router={moe.router}: weighs what experts read, so no scale makes the layer equal; choose another"
    )
  if scale is None:
    _sum_of_weights(moe)
  sparse = {"ffn": FFNS.resolve("moe"), "moe": moe}
  blocks = [block for segment in config.blocks for block in segment.pattern * segment.repeats]
  blocks = [dataclasses.replace(b, **sparse) if b.ffn == config.dense_ffn else b for b in blocks]
  check_causal(with_blocks(config, blocks))
  return moe


def _sum_of_weights(moe: MoEConfig) -> float:
  """The mean sum of a token's combine weights while all logits are equal."""
  # With values, unlike that of `routed_layer`: some routers scale weights by a parameter.
  sizes = {"num_experts": moe.num_experts, "num_experts_per_token": moe.num_experts_per_token}
  router = made(ROUTERS, moe.router, Router, dim=1, init_scale=1.0, rngs=nnx.Rngs(0), **sizes)
  shape = (1, 4 * moe.num_experts)  # tokens: enough for routers whose experts choose
  index = jnp.zeros(shape, jnp.int32)
  context = RouterContext(jnp.ones(shape, bool), token_id=index, sequence=index, domain=index)
  routing = router.from_logits(jnp.zeros((*shape, router.num_scored_experts or moe.num_experts)), context)
  if routing is None:
    raise InputError(
      f"--router={moe.router}: does not follow from logits alone; give `scale`, or choose another router"
    )
  assignment = routing.assignment
  total = float(jnp.where(assignment.valid_A, assignment.weight_A, 0).sum()) / shape[1]
  if not total > 0:
    raise InputError(
      f"--router={moe.router}: its weights are 0 while all logits are equal; give `scale`, or choose another router"
    )
  return total


def _chosen(layers: tuple[Layer, ...], wanted: Iterable[int] | None) -> set[int]:
  dense = {i for i, layer in enumerate(layers) if "ffn.w_up_DF" in layer.values}
  if not dense:
    raise InputError("upcycle: the model has no layer with a dense feed-forward part")
  chosen = dense if wanted is None else set(wanted)
  wrong = sorted(chosen - dense)
  if wrong:
    raise InputError(f"upcycle: layers={wrong} are not dense; dense layers are {sorted(dense)}")
  return chosen


def _with_moe(layer: Layer, moe: MoEConfig) -> Layer:
  """A block without experts does not read its `moe`. All blocks name the same, so that short fields can say them."""
  has_experts = any(path.startswith("ffn.experts.") for path in layer.values)
  return layer if has_experts else layer._replace(block=dataclasses.replace(layer.block, moe=moe))


def _upcycled(
  layer: Layer, *, moe: MoEConfig, shuffle, reinit, noise, router_std, scale, rng: np.random.Generator
) -> Layer:
  dense = layer.under("ffn.")
  dim, dense_dim = dense["w_up_DF"].shape
  e, f = moe.num_experts, moe.expert_dim
  copies = -(-e * f // dense_dim)
  units = [rng.permutation(dense_dim) if shuffle else np.arange(dense_dim) for _ in range(copies)]
  unit_EF = np.concatenate(units)[: e * f].reshape(e, f)
  # The same units are new in all matrices of an expert.
  is_new_EF = rng.permuted(np.broadcast_to(np.arange(f) < round(reinit * f), (e, f)), axis=1)
  values = layer.without("ffn.")
  for name, own in _MATRICES.items():
    if dense.get(name) is None:
      continue
    by_unit = dense[name].T if name != "w_down_FD" else dense[name]  # [F, D]
    w_EFD = by_unit[unit_EF].astype(np.float32)
    std = float(by_unit.std())
    w_EFD = np.where(is_new_EF[..., None], std * rng.standard_normal(w_EFD.shape), w_EFD)
    w_EFD = w_EFD + noise * std * rng.standard_normal(w_EFD.shape) if noise else w_EFD
    w_EFD = w_EFD * scale(dense_dim) if name == "w_down_FD" else w_EFD
    w = w_EFD if name == "w_down_FD" else w_EFD.swapaxes(1, 2)
    values[f"ffn.experts.{own}"] = np.ascontiguousarray(w, dense[name].dtype)
  router = routed_layer(moe).router
  if hasattr(router, "w_router_DE"):  # other routers begin as they do
    copy_E = np.arange(e) * f // dense_dim if dense_dim % f == 0 else np.arange(e)
    columns = router_std * rng.standard_normal((dim, e)).astype(np.float32)
    # Those that the router serves itself are copies of nothing.
    further = router_std * rng.standard_normal((dim, (router.num_scored_experts or e) - e)).astype(np.float32)
    values["ffn.router.w_router_DE"] = np.concatenate([columns[:, copy_E], further], axis=1)
  block: BlockConfig = dataclasses.replace(layer.block, ffn=FFNS.resolve("moe"), moe=moe)
  return Layer(block, values)
