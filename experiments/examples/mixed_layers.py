"""A model whose layers differ in routers, numbers of experts and kinds of attention, trained for a few steps.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/examples/mixed_layers.py

The first layer is dense. The next two route by a frozen table, as in the first layers of DeepSeek-V4. The others route
by sigmoid scores over more experts, and every other one of them attends to a window only. Eight devices give the same
numbers as one.
"""

import tempfile

import moe_jax
from moe_jax import BlockConfig, MoEConfig, Segment

TABLE = MoEConfig(num_experts=4, num_experts_per_token=1, expert_dim=32, router="frozen_table_topk")
SIGMOID = MoEConfig(num_experts=8, expert_dim=16, router="sigmoid_topk", balancers="loss_free_bias:0.01")
MODEL = moe_jax.ModelConfig(
  model_dim=32,
  head_dim=8,
  dense_dim=64,
  remat="full",
  segments=(
    Segment((BlockConfig(ffn="mlp"),)),
    Segment((BlockConfig(moe=TABLE),), repeats=2),
    Segment((BlockConfig("attention:window=16", moe=SIGMOID), BlockConfig(moe=SIGMOID)), repeats=2),
  ),
)


def config(mesh: moe_jax.MeshConfig) -> moe_jax.Config:
  return moe_jax.Config(
    model=MODEL,
    data=moe_jax.DataConfig(dataset="markov", sequence_length=32, batch_size=16),
    train=moe_jax.TrainConfig(num_steps=5, accumulation=2, log_every=1, eval_batches=2, tensorboard=False),
    mesh=mesh,
  )


def train(mesh: moe_jax.MeshConfig, folder: str) -> dict:
  run = config(mesh)
  return moe_jax.Run(run, moe_jax.load_dataset(run.data), folder).train()


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as folder:
    result = train(moe_jax.MeshConfig(), folder)
  print("MaxVio by layer", [round(x, 2) for x in result["validation"]["max_vio"]])
