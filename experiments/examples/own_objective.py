"""An objective and a hook of your own: label smoothing, and an average of the parameters.

  python experiments/load_balancing.py --plugins=experiments/examples/own_objective.py \\
    --objective=label_smoothing:0.1 --hooks=averaged:0.99
"""

import dataclasses

import jax
from flax import nnx

import moe_jax


@dataclasses.dataclass(frozen=True)
class LabelSmoothing(moe_jax.NextToken):
  """(1 - amount) times the likelihood, and amount times that of a uniform target (1512.00567, section 7)."""

  amount: float = 0.1

  def token_losses(self, logits_BLV, targets_BL):
    uniform_BL = -jax.nn.log_softmax(logits_BLV).mean(axis=-1)
    return (1 - self.amount) * super().token_losses(logits_BLV, targets_BL) + self.amount * uniform_BL


class Averaged(moe_jax.Hook):
  """average <- decay * average + (1 - decay) * parameters, after every step."""

  def __init__(self, decay: float = 0.99):
    self.decay = decay

  def init(self, model):
    return jax.tree.map(lambda x: x + 0, nnx.state(model, nnx.Param))

  def __call__(self, model, average, aux):
    blend = lambda old, new: self.decay * old + (1 - self.decay) * new
    return jax.tree.map(blend, average, nnx.state(model, nnx.Param))


moe_jax.register("objective", "label_smoothing", LabelSmoothing)
moe_jax.register("hook", "averaged", Averaged)
