"""Balancers on recorded router logits: what a bias would have done to the choices of a run, without training.

Each recorded step is routed with the balancer's bias, observed, and the balancer updated, as in training. The
trace's own router and balancer give the counts and biases that the run itself had.

What a replay cannot show: the logits are those of the recorded run. A router trained under another balancer would
have had others, for its experts would have seen other tokens; and early logits differ from late ones. A replay
compares how fast and how steadily biases follow a given stream of logits, and nothing about the loss of
the model. Balancers that act only through a loss change no recorded logit and are refused.

Axes as in `moe_jax.types`, and I: optimizer steps, of the recorded run or of the replay; J: pieces of a recorded step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.recording import recorded_config
from moe_jax.config import MoEConfig, spec_text
from moe_jax.errors import InputError
from moe_jax.nn.build import resolve_moe, routed_layer
from moe_jax.nn.context import Context
from moe_jax.nn.moe import MoE, group_context
from moe_jax.nn.routers import Router
from moe_jax.ops import stats
from moe_jax.ops.balancing import BALANCERS, make_balancer
from moe_jax.ops.routing import to_batch
from moe_jax.training.router_trace import CHUNK_BYTES, Steps, Trace
from moe_jax.types import Array, BatchRouting, ExpertScale, PyTree, StepStats


class Replay(NamedTuple):
  """What a balancer did with a trace. One entry per update, i.e. per optimizer step of `batch_size` sequences."""

  balancers: str
  router: str
  batch_size: int
  step_I: np.ndarray  # int64, the recorded step that the update's last sequence is from
  tokens_per_expert_IRE: np.ndarray  # float32 counts before capacity
  bias_IRE: np.ndarray | None  # what moved the choices of the update; None without a bias
  final_bias_RE: np.ndarray | None  # after the last update

  @property
  def max_vio_IR(self) -> np.ndarray:
    """max(load) / mean(load) - 1 of each update's tokens."""
    return np.asarray(stats.max_vio(jnp.asarray(self.tokens_per_expert_IRE)))

  def tail(self, fraction: float = 0.25) -> "Tail":
    """Numbers of the last part of the updates, means over layers."""
    count = max(1, round(len(self.step_I) * fraction))
    max_vio_IR, counts_IRE = self.max_vio_IR[-count:], self.tokens_per_expert_IRE[-count:]
    bias_IRE = None if self.bias_IRE is None else self.bias_IRE[-count:]
    return Tail(
      updates=count,
      max_vio=float(max_vio_IR.mean()),
      max_vio_std=float(max_vio_IR.std(axis=0).mean()),
      max_vio_summed=float(np.mean(stats.max_vio(jnp.asarray(counts_IRE.sum(axis=0))))),
      bias_std=None if bias_IRE is None else float(bias_IRE.std(axis=0).mean()),
    )


class Tail(NamedTuple):
  """How balanced and how steady the last updates of a replay are."""

  updates: int
  max_vio: float  # mean over updates of the MaxVio of each
  max_vio_std: float  # standard deviation of that over updates: the oscillation of the load
  max_vio_summed: float  # MaxVio of the counts summed over updates: what chance in one batch hides
  bias_std: float | None  # standard deviation of a bias over updates, mean over experts


def replay(
  trace: Trace,
  balancers: str,
  *,
  router: str = "",
  batch_size: int = 0,
  piece_size: int = 0,
  chunk_steps: int = 0,
) -> Replay:
  """Replays `balancers` on a trace.

  Args:
    trace: recorded with `--record_router_logits`.
    balancers: as for `--balancers`. Losses beside a bias do nothing.
    router: as for `--router`; empty: the recorded one. Logits of one router may mean little to another.
    batch_size: sequences per optimizer step; 0: as recorded. More: several recorded steps become one; fewer: a
      step becomes several. Sequences stay in their order, and those left over at the end are not used.
    piece_size: sequences routed at a time, of which an update takes several; 0: as many as batch and recorded
      step have in common. Changes no result; one number for several batch sizes is compiled once.
    chunk_steps: recorded steps in memory at a time; 0: about 64 MiB. Changes no result.

  Routers that draw get the run's own keys, and groups of several sequences are made of neighbours, as in training.

  Raises:
    InputError: balancers that act only through a loss or do not suit the router, a router that reads what
      is not recorded or has another number of experts, a batch size that is none, or a trace in which steps are
      missing, for a bias depends on all steps before.
  """
  if trace.missing:
    raise InputError(f"{trace.folder}: {trace.missing}; a replay needs all: record the run in a new folder")
  moe = recorded_config(trace)
  moe = resolve_moe(dataclasses.replace(moe, balancers=balancers, router=router or moe.router))
  batch_size = batch_size or trace.shape[1]
  piece = piece_size or math.gcd(batch_size, trace.shape[1])
  check_replay(moe, trace.shape, len(trace), batch_size, piece)
  counts_JRE, bias_JRE, final_bias_RE = _run(moe, trace, batch_size, piece, chunk_steps)
  num_updates = len(trace) * trace.shape[1] // batch_size
  per_update = batch_size // piece
  in_updates = lambda x_J: x_J[: num_updates * per_update].reshape(num_updates, per_update, *x_J.shape[1:])
  last_sequence_I = (np.arange(num_updates) + 1) * batch_size - 1
  return Replay(
    balancers=balancers,
    router=str(moe.router),
    batch_size=batch_size,
    step_I=trace.step_I[last_sequence_I // trace.shape[1]],
    tokens_per_expert_IRE=in_updates(counts_JRE).sum(axis=1),
    bias_IRE=None if bias_JRE is None else in_updates(bias_JRE)[:, 0],
    final_bias_RE=final_bias_RE,
  )


def bias_methods(num_experts: int) -> list[str]:
  """The balancers of the registry that move choices by a bias, and suit so many experts and a plain router."""

  def has_bias(name: str) -> bool:
    try:
      balancer = make_balancer(name)
      balancer.suits(Router, 0)  # whose class attributes are those of a plain top-k router
      return balancer.bias(balancer.init(num_experts)) is not None
    except InputError:
      return False

  return [name for name in BALANCERS if has_bias(name)]


def check_replay(
  moe: MoEConfig, shape: tuple[int, int, int, int], num_steps: int, batch_size: int, piece: int
) -> None:
  """Raises what `replay` raises, for a trace of so many steps of `shape` (R, B, L, E) that may not exist yet."""
  moe = resolve_moe(moe)
  layer = routed_layer(moe)
  _, recorded, length, num_scored = shape
  if layer.num_scored_experts != num_scored:
    raise InputError(
      f"--router={moe.router}: scores {layer.num_scored_experts} experts, and the trace has logits of {num_scored}"
    )
  group = layer.tokens_per_group(length)
  if batch_size < 1:
    raise InputError(f"--batch_size={batch_size}: must be 1 or more")
  if piece < 1 or recorded % piece or batch_size % piece or piece * length % group:
    raise InputError(
      f"--batch_size={batch_size}: replayed {piece} sequences at a time, which must divide it and the recorded "
      f"{recorded} sequences, and make whole groups of {group} tokens with {length} tokens each"
    )
  if batch_size > num_steps * recorded:
    raise InputError(f"--batch_size={batch_size}: more than the {num_steps * recorded} recorded sequences")
  if _only_loss(moe, layer, piece, length):
    raise InputError(
      f"--balancers={spec_text(moe.balancers)}: acts only through a loss, and recorded logits do not answer to a loss; "
      "replay a balancer with a bias, e.g. loss_free_bias:0.001"
    )


def _only_loss(moe: MoEConfig, layer: MoE, batch: int, length: int) -> bool:
  """Whether the balancers have losses but no bias; nothing is computed.

  Raises:
    InputError: the router reads what a trace does not have.
  """
  balancer = layer.balancer
  state = balancer.init(layer.num_scored_experts)

  def losses(logits_BLE):
    keys_B2 = jnp.zeros((batch, 2), jnp.uint32)
    routing = _route(layer, logits_BLE, jnp.ones((batch, length), bool), keys_B2, balancer.bias(state))
    observed = balancer.observe(state, routing)
    return balancer.losses(state, routing, StepStats(observed, observed))

  shape = (batch, length, layer.num_scored_experts)
  try:
    found = jax.eval_shape(losses, jax.ShapeDtypeStruct(shape, jnp.float32))
  except InputError as error:
    raise InputError(f"--router={moe.router}: {error}, and a trace does not have it") from None
  return bool(found) and balancer.bias(state) is None


def _run(
  moe: MoEConfig, trace: Trace, batch_size: int, piece: int, chunk_steps: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
  """(counts_JRE, bias_JRE, final bias_RE). J: pieces of a recorded step, of which an update takes several."""
  num_layers, recorded, _, num_scored = trace.shape
  balancer = make_balancer(moe.balancers)
  state = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_layers), balancer.init(num_scored))
  start, run_chunk = _compiled(moe, trace.layers)
  chunk_steps = min(chunk_steps or max(1, CHUNK_BYTES // trace.bytes_per_step), len(trace))
  carry, outputs, done = None, [], 0
  for steps in trace.chunks(chunk_steps):
    pieces = _pieces(steps, piece)
    num_pieces = len(pieces[0])
    done_J = done + piece * (1 + np.arange(num_pieces))  # sequences up to and with each piece
    # The last chunk is filled up to the size of the others, for which the program is compiled: with pieces
    # that complete no update, so nothing of them is kept.
    missing = chunk_steps * recorded // piece - num_pieces
    filled = [np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for x in pieces]
    completes_J = np.concatenate([done_J % batch_size == 0, np.zeros(missing, bool)])
    carry = carry or start(state, *(x[0] for x in filled))
    carry, found = run_chunk(carry, (*filled, completes_J))
    outputs.append(jax.tree.map(lambda x, n=num_pieces: np.asarray(x)[:n], found))
    done = int(done_J[-1])
  counts_JRE, bias_JRE = jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
  final_bias_RE = jax.vmap(lambda layer, state: _as_array(balancer.bias(state)))(
    np.arange(num_layers), carry[0]
  )
  return counts_JRE, bias_JRE, None if final_bias_RE is None else np.asarray(final_bias_RE)


def _pieces(steps: Steps, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(logits, mask, keys) of consecutive pieces of `piece` sequences; logits [pieces, R, piece, L, E]."""
  cut = lambda x: x.reshape(-1, piece, *x.shape[2:])
  logits_JBRLE = cut(np.moveaxis(steps.logits_IRBLE, 1, 2))
  return np.moveaxis(logits_JBRLE, 2, 1), cut(steps.mask_IBL), cut(steps.key_IB2)


@functools.lru_cache(maxsize=64)
def _compiled(moe: MoEConfig, layers: tuple[int, ...]) -> tuple[Callable, Callable]:
  """Jitted: (state per layer, first piece) -> carry; (carry, pieces) -> (carry, (counts_JRE, bias_JRE)).

  The carry is the state and the statistics so far of the update under way. That pieces of an update may be
  observed one by one is the contract of a balancer, and so one program serves every batch size.
  """
  layer = routed_layer(moe)
  balancer = layer.balancer
  one_layer = jax.vmap(functools.partial(_one_layer, layer), (0, 0, 0, None, None))
  update_layer = jax.vmap(lambda layer, state, stats: balancer.update(state, stats))
  layer_R = jnp.array(layers)

  def start(state, *first_piece):
    observed, _ = jax.eval_shape(one_layer, layer_R, state, *first_piece)
    return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), observed)

  def one_piece(carry, inputs):
    state, so_far = carry
    *piece, completes = inputs
    observed, outputs = one_layer(layer_R, state, *piece)
    total = jax.tree.map(jnp.add, so_far, observed)
    updated = update_layer(layer_R, state, total)
    choose = lambda new, old: jnp.where(completes, new, old)
    carry = jax.tree.map(choose, updated, state), jax.tree.map(lambda x: choose(jnp.zeros_like(x), x), total)
    return carry, outputs

  return jax.jit(start), jax.jit(lambda carry, pieces: jax.lax.scan(one_piece, carry, pieces))


def _one_layer(
  moe: MoE,
  layer: Array,
  state: PyTree,
  logits_BLE: Array,
  mask_BL: Array,
  key_B2: Array,
) -> tuple[PyTree, tuple[Array, Array | None]]:
  bias_E = moe.balancer.bias(state)
  routing = route_layer(moe, layer, logits_BLE, mask_BL, key_B2, bias_E)
  return moe.balancer.observe(state, routing), (routing.selected_BLE.sum(axis=(0, 1)), _as_array(bias_E))


def route_layer(
  moe: MoE, layer: Array, logits_BLE: Array, mask_BL: Array, key_B2: Array, bias_E: PyTree
) -> BatchRouting:
  """Returns what the layer of that number in the model chooses, with the keys and groups of training."""
  keys_B = jax.vmap(lambda key: jax.random.fold_in(key, layer))(jax.random.wrap_key_data(key_B2))
  return _route(moe, logits_BLE.astype(jnp.float32), mask_BL, jax.random.key_data(keys_B), bias_E)


def _route(moe: MoE, logits_BLE: Array, mask_BL: Array, key_B2: Array, bias_E: PyTree) -> BatchRouting:
  batch, length, num_scored = logits_BLE.shape
  t = moe.tokens_per_group(length)
  context = Context(mask_BL, jax.random.wrap_key_data(key_B2), train=True)
  of_groups = group_context(context, logits_BLE.shape, t, bias_E)
  routing = moe.router.from_logits(logits_BLE.reshape(-1, t, num_scored), of_groups)
  if routing is None:
    raise InputError("the router needs more than logits")
  return to_batch(routing, batch, length, moe.num_experts_per_token)


def _as_array(bias: Array | ExpertScale | None) -> Array | None:
  return bias.factor_E if isinstance(bias, ExpertScale) else bias
