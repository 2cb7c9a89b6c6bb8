"""The MoE layer in a model and a training loop of your own, balanced without a loss.

  python experiments/examples/own_loop.py

Prints the MaxVio of the layer before and after training. It falls.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import moe_jax


class Model(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.moe = moe_jax.MoE(16, num_experts=8, expert_dim=32, balancer="loss_free_bias:0.05", rngs=rngs)
    self.head = nnx.Linear(16, 1, rngs=rngs)

  def __call__(self, x_BLD):
    y_BLD, aux = self.moe(x_BLD, moe_jax.Context(train=True))
    return self.head(x_BLD + y_BLD)[..., 0], aux


@nnx.jit
def step(model, optimizer, x_BLD):
  def loss_fn(model):
    y_BL, aux = model(x_BLD)
    return jnp.mean((y_BL - jnp.sin(x_BLD.sum(-1))) ** 2) + aux.loss, aux

  (loss, aux), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
  optimizer.update(model, gradients)
  moe_jax.update_balancers(model, aux)
  return loss, moe_jax.read_metrics(aux)["max_vio"].mean()


def main() -> tuple[float, float]:
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
  x_BLD = jax.random.normal(jax.random.key(1), (8, 64, 16)) + 1.0
  max_vios = [float(step(model, optimizer, x_BLD)[1]) for _ in range(60)]
  print(f"MaxVio {max_vios[0]:.2f} at the first step, {max_vios[-1]:.2f} at the last")
  return max_vios[0], max_vios[-1]


if __name__ == "__main__":
  main()
