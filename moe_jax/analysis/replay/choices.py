"""What a recorded run chose itself: its router on its logits, with the bias that its balancers had at that step.

A trace has no bias. That of a balancer follows from the counts of all steps before, so a replay of the run's own
balancers gives it again.

Axes as in `moe_jax.types`, and I: recorded steps.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.recording import has_bias, recorded_config
from moe_jax.analysis.replay.replay import check_replay, replay, route_layer
from moe_jax.config import MoEConfig, spec_text
from moe_jax.errors import InputError
from moe_jax.nn.build import resolve_moe, routed_layer
from moe_jax.training.router_trace import Steps, Trace
from moe_jax.types import Array, ExpertScale


class OwnChoices:
  """The experts that the tokens of a trace were sent to, before capacity.

  Args:
    trace: recorded with `--record_router_logits`.

  Raises:
    InputError: what `check_choices` raises, or a bias that does not follow from the trace: steps are missing or were
      not recorded, or the run began with the balancers of another one.
  """

  def __init__(self, trace: Trace):
    moe = recorded_config(trace)
    check_choices(moe, trace.shape, len(trace))
    self.num_experts_per_token = moe.num_experts_per_token
    self._trace = trace
    self._route = _compiled(resolve_moe(moe), trace.layers)
    self._bias_IRE = _own_bias(trace, moe) if has_bias(moe) else None

  def read(self, start: int, stop: int) -> tuple[Steps, np.ndarray]:
    """Returns recorded steps `start` to `stop`, and selected_IRBLE, bool: False everywhere for padding.

    They are routed as one step of training, which has one bias: that of `start`. With the bias of each, one that swings
    from step to step would look balanced.
    """
    steps = self._trace.read(start, stop)
    bias_RE = None if self._bias_IRE is None else self._bias_IRE[start]
    inputs = zip(steps.logits_IRBLE, steps.mask_IBL, steps.key_IB2, strict=True)
    return steps, np.stack([np.asarray(self._route(*each, bias_RE)) for each in inputs])


def check_choices(moe: MoEConfig, shape: tuple[int, int, int, int], num_steps: int) -> None:
  """Checks that the choices of a run of `moe` follow from a trace of so many steps of `shape` (R, B, L, E).

  Raises:
    InputError: if its router reads what a trace does not have, or scores more than the experts that devices hold.
  """
  # A loss moves no choice, so the logits alone decide.
  own = moe if has_bias(moe) else dataclasses.replace(moe, balancers="none")
  check_replay(own, shape, num_steps, shape[1], shape[1])
  layer = routed_layer(resolve_moe(moe))
  if further := layer.num_scored_experts - layer.num_experts:
    raise InputError(
      f"--router={spec_text(moe.router)}: has {further} zero-computation experts, which no device holds; "
      "take a run without them"
    )


def _own_bias(trace: Trace, moe: MoEConfig) -> np.ndarray:
  """bias_IRE, what moved the choices of each recorded step."""
  balancers = spec_text(moe.balancers)
  of_run = f"{trace.folder}: the bias of {balancers}"
  if trace.header["every"] != 1:
    raise InputError(f"{of_run} depends on every step; record the run again with --record_router_logits=1")
  if trace.header.get("config", {}).get("train", {}).get("init_from"):
    raise InputError(
      f"{of_run} may come from --init_from, which a trace does not have; take a run from step 0"
    )
  return replay(trace, balancers).bias_IRE


@functools.lru_cache(maxsize=64)
def _compiled(moe: MoEConfig, layers: tuple[int, ...]) -> Callable[..., Array]:
  """Jitted: (logits_RBLE, mask_BL, key_B2, bias_RE or None) of a step -> selected_RBLE, bool."""
  layer = routed_layer(moe)
  multiplies = isinstance(layer.balancer.bias(layer.balancer.init(layer.num_scored_experts)), ExpertScale)

  def one_layer(number, logits_BLE, mask_BL, key_B2, bias_E):
    bias = ExpertScale(bias_E) if multiplies else bias_E
    return route_layer(layer, number, logits_BLE, mask_BL, key_B2, bias).selected_BLE > 0

  every_layer = jax.vmap(one_layer, (0, 0, None, None, 0))
  return jax.jit(lambda *inputs: every_layer(jnp.array(layers), *inputs))
