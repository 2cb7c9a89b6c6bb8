"""MiniMax-Text-01 (2501.08313): seven layers of lightning attention, then one of softmax attention, ten times.

The residual stream of a layer is its normed input, weighted as in DeepNorm. Rotary positions turn half of each head.
The paper gives their base as 10,000, the released configuration as 10,000,000.
"""

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig, Segment
from moe_jax.models.settings import TOY_VOCAB_SIZE, Published, published, tiny


def _segments(lightning: str, lightning_layers: int, alpha: float, repeats: int) -> tuple[Segment, ...]:
  block = lambda mixer: BlockConfig(mixer, residual=f"normed_input:{alpha}:1.0")
  softmax = block("attention:rotary_fraction=0.5")
  return (Segment((block(lightning),) * lightning_layers + (softmax,), repeats),)


_MINIMAX = ModelConfig(
  segments=_segments("lightning:chunk=256", 7, alpha=3.5565588200778455, repeats=10),  # (2 * 80)^0.25
  model_dim=6144,
  num_heads=64,
  num_kv_heads=8,
  head_dim=128,
  dense_dim=9216,
  rope_theta=1e7,
  norm_eps=1e-5,
  compute_dtype="bfloat16",
  moe=MoEConfig(
    num_experts=32,
    num_experts_per_token=2,
    expert_dim=9216,
    router="softmax_topk:softmax=after",
    balancers="switch_loss:2.5e-05",  # 0.001 in Hugging Face's convention: x K / num_layers
    dispatcher="dropless",  # the paper trains with a capacity, and drops
  ),
)

PRESETS = {"minimax_text_01": published(_MINIMAX)}
PRESETS["minimax_text_01_tiny"] = tiny(
  PRESETS["minimax_text_01"],
  {"num_experts": 8},
  segments=_segments("lightning:chunk=16", 2, alpha=6**0.25, repeats=1),
)
VOCAB_SIZES = {"minimax_text_01": 200_064, "minimax_text_01_tiny": TOY_VOCAB_SIZE}
PUBLISHED = {"minimax_text_01": Published("456B", "45.9B", "2501.08313")}
