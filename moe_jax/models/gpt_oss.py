"""gpt-oss (2508.10925): biases everywhere, attention sinks, and a sliding window in every other layer.

The values of 128 for the window and of 1.702 and 7 for the clipped SwiGLU are those of the released configuration and
code.
"""

from moe_jax.config import BlockConfig, Config, ModelConfig, MoEConfig, Segment
from moe_jax.models.settings import TOY_VOCAB_SIZE, Published, published, tiny


def _segments(window: int, yarn_length: int, repeats: int) -> tuple[Segment, ...]:
  """Pairs of layers: one that attends within the window, and one that attends to everything."""
  yarn = f"yarn_factor=32:yarn_length={yarn_length}:yarn_truncate=false"
  attention = f"attention:qkv_bias=true:out_bias=true:sinks=true:{yarn}"
  return (Segment((BlockConfig(f"{attention}:window={window}"), BlockConfig(attention)), repeats),)


def _model(layers: int, num_experts: int) -> ModelConfig:
  return ModelConfig(
    segments=_segments(128, 4096, layers // 2),
    model_dim=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    dense_dim=2880,
    rope_theta=150_000.0,
    norm_eps=1e-5,
    compute_dtype="bfloat16",
    moe=MoEConfig(
      num_experts=num_experts,
      num_experts_per_token=4,
      expert_dim=2880,
      router="gpt_oss_topk",
      experts="clipped_swiglu",
      balancers=f"switch_loss:{0.9 * 4 / layers:.6g}",  # 0.9 in Hugging Face's convention: x K / num_layers
      dispatcher="dropless",
    ),
  )


def _tiny(config: Config) -> Config:
  moe = {"num_experts": 8, "num_experts_per_token": 2}
  return tiny(config, moe, segments=_segments(window=8, yarn_length=16, repeats=1))


_FULL = {"gpt_oss_20b": published(_model(24, 32)), "gpt_oss_120b": published(_model(36, 128))}
PRESETS = _FULL | {f"{name}_tiny": _tiny(config) for name, config in _FULL.items()}
VOCAB_SIZES = dict.fromkeys(PRESETS, TOY_VOCAB_SIZE) | dict.fromkeys(_FULL, 201_088)
PUBLISHED = {
  "gpt_oss_20b": Published("20.9B", "3.6B", "2508.10925"),
  "gpt_oss_120b": Published("116.8B", "5.1B", "2508.10925"),
}
