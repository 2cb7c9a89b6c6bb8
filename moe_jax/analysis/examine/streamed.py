"""Examines a model of which one layer is in memory at a time."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.examine.examination import Examination, prepare
from moe_jax.analysis.examine.sums import Sizes, Sums, sums_of_choices
from moe_jax.data import Batch
from moe_jax.nn.block import BlockAux
from moe_jax.nn.context import Context
from moe_jax.nn.transformer import Transformer
from moe_jax.types import Array


class Stream(Protocol):
  """A model that runs layer by layer, such as `moe_jax.LayerStream`."""

  model: Transformer  # without values

  def forward(self, batches: Sequence[tuple[Array, Context]], see: Any) -> list[Array]: ...


def examine_stream(
  stream: Stream, batches: Iterable[Batch], domains: Sequence[str], num_devices: int
) -> Examination:
  """Returns what `examine` does for the same model. All batches go through a layer before the next one is read.

  Of what the routers chose, only the last two layers are in memory.

  Raises:
    InputError: as `examine`.
  """
  batches = list(batches)
  what = prepare(stream.model, batches, domains, num_devices)
  layers: list[Sums] = []  # of one layer each, all batches together
  sequences: list[list[np.ndarray]] = []
  before: dict[int, np.ndarray] = {}  # by batch, the choices of the last layer with experts

  def see(layer: int, i: int, aux: BlockAux) -> None:
    del layer
    if aux.ffn is None:
      return
    if i == 0:
      sequences.append([])
    r = len(sequences) - 1
    padding = max(what.sizes.num_experts) - what.sizes.num_experts[r]
    selected_BLE = jnp.pad(aux.ffn.selected_BLE, [(0, 0), (0, 0), (0, padding)])
    previous_BLE = jnp.asarray(before.get(i, np.zeros(selected_BLE.shape, bool)), jnp.float32)
    entropy = aux.ffn.metrics["router_entropy"][0]
    own = what.sizes._replace(num_experts=what.sizes.num_experts[r : r + 1])
    sums = jax.device_get(_sums(previous_BLE, selected_BLE, entropy, batches[i], what.place_V, own))
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    sequences[r].append(sums.per_sequence_RBE)
    if i == 0:
      layers.append(sums)
    else:
      layers[r] = jax.tree.map(np.add, layers[r], sums)
    before[i] = np.asarray(selected_BLE, bool)

  context = lambda batch: Context(
    batch["mask_BL"], domain_B=batch["domain_B"], num_domains=what.sizes.num_domains, record_logits=True
  )
  stream.forward([(batch["tokens_BL"], context(batch)) for batch in batches], see)
  return what.finish(_joined(layers, sequences))


@functools.partial(jax.jit, static_argnames="sizes")
def _sums(
  previous_BLE: Array, selected_BLE: Array, entropy: Array, batch: Batch, place_V: Array, sizes: Sizes
) -> Sums:
  """The sums of one layer. `next_RXE` has the pairs with the layer before."""
  sums = sums_of_choices(selected_BLE[None], entropy[None], batch, place_V, sizes)
  return sums._replace(next_RXE=jnp.einsum("BLX,BLE->XE", previous_BLE, selected_BLE)[None])


def _joined(layers: Sequence[Sums], sequences: Sequence[Sequence[np.ndarray]]) -> Sums:
  """The sums of all layers."""
  per_layer = [field for field in Sums._fields if field != "tokens"]
  fields = {name: [getattr(sums, name) for sums in layers] for name in per_layer}
  fields["next_RXE"] = fields["next_RXE"][1:] or [fields["next_RXE"][0][:0]]
  fields["per_sequence_RBE"] = [np.concatenate(of_layer, axis=1) for of_layer in sequences]
  return Sums(layers[0].tokens, **{name: np.concatenate(arrays) for name, arrays in fields.items()})
