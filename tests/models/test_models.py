"""Published models have their published number of parameters, and every preset the number that its sizes give."""

import functools
import math
import re

import pytest
from flax import nnx

import moe_jax
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.models import PRESETS, PUBLISHED, VOCAB_SIZES, preset
from moe_jax.training.compiled import abstract_model, resolve_config

account = functools.cache(moe_jax.account)

# (name, V, all parameters without multi-token prediction, active ones in the three conventions in 10^9): computed
# from the released configurations by hand, formula by formula.
TOTALS = [
  ("mixtral_8x7b", 32_000, 46_702_792_704, (12.880, 12.749, 12.618)),
  ("mixtral_8x22b", 32_000, 140_620_634_112, (39.152, 38.955, 38.759)),
  ("mixtral_8x22b", 32_768, 140_630_071_296, (39.161, 38.960, 38.759)),
  ("deepseek_moe_16b", 102_400, 16_375_728_128, (2.829, 2.619, 2.409)),
  ("deepseek_v2_lite", 102_400, 15_706_484_224, (2.661, 2.451, 2.242)),
  ("deepseek_v2", 102_400, 235_741_434_880, (21.376, 20.852, 20.327)),
  ("deepseek_v3", 129_280, 671_026_419_200, (37.552, 36.626, 35.699)),
  ("kimi_k2", 163_840, 1_026_408_232_448, (32.862, 31.687, 30.513)),
  ("minimax_text_01", 200_064, 456_089_655_296, (48.403, 47.174, 45.945)),
  ("qwen15_moe_a27b", 151_936, 14_315_784_192, (2.689, 2.378, 2.067)),
  ("qwen2_57b_a14b", 151_936, 57_408_658_944, (14.249, 13.705, 13.160)),
  ("qwen3_30b_a3b", 151_936, 30_532_122_624, (3.353, 3.042, 2.731)),
  ("qwen3_235b_a22b", 151_936, 235_093_634_560, (22.191, 21.568, 20.946)),
  ("olmoe_1b_7b", 50_304, 6_919_161_856, (1.282, 1.179, 1.076)),
  ("gpt_oss_20b", 201_088, 20_914_757_184, (4.187, 3.608, 3.029)),
  ("gpt_oss_120b", 201_088, 116_829_156_672, (5.712, 5.133, 4.554)),
]


@pytest.mark.parametrize(("name", "vocab_size", "total", "active"), TOTALS)
def test_published_models_have_their_parameters(name, vocab_size, total, active):
  found = account(name, vocab_size)
  assert found.parameters.total == total
  assert [round(x / 1e9, 3) for x in found.active] == list(active)


def test_computed_totals_are_near_the_published_ones():
  """Within the rounding of their words, except for Kimi K2, whose configuration has 1.3% less than its report."""
  units = {"B": 1e9, "T": 1e12}
  for name, says in PUBLISHED.items():
    number, unit = re.fullmatch(r"([\d.]+)([BT])", says.total).groups()
    total, step = float(number) * units[unit], 10 ** -len(number.partition(".")[2]) * units[unit]
    found = account(name).parameters.total
    if not name.endswith("_like"):  # which are other models
      bound = 0.014 * total if name == "kimi_k2" else step
      assert abs(found - total) <= bound, name


def test_every_published_model_has_a_tiny_one_of_the_same_parts():
  """The same mixers, feed-forward parts, residuals, routers and experts, in the same order, with other numbers."""
  for name in PUBLISHED:
    full, tiny = (_parts(resolve_config(PRESETS[n]).model) for n in (name, f"{name}_tiny"))
    assert tiny == full, name


def _parts(config: ModelConfig) -> list:
  """The different blocks: their parts, the options that are no sizes, and which parameters they have."""
  found = []
  for segment in config.blocks:
    for block in segment.pattern:
      methods = block.mixer, block.ffn, block.residual, block.moe.router, block.moe.experts
      row = [(m.name, [(n, v) for n, v in m.options if isinstance(v, bool | str)]) for m in methods]
      losses = [m.name for m in block.moe.balancers]
      shared = block.moe.num_shared_experts, block.moe.shared_expert_gate, block.moe.shared_expert_dim > 0
      if (row, losses, shared) not in found:
        found.append((row, losses, shared))
  return found


def parameters_by_hand(model: ModelConfig, vocab_size: int) -> int:
  """Layer by layer: attention, two norms, and either experts with their router or one dense block."""
  d, moe, total = model.model_dim, model.moe, 0
  matrices_of = {"swiglu": 3, "relu": 2}
  for layer in range(1, model.num_layers + 1):
    total += 2 * d + (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * d
    total += 2 * model.head_dim if model.qk_norm else 0
    if layer % model.moe_every:
      total += matrices_of[model.activation] * d * model.dense_dim
    else:
      total += d * moe.num_experts + moe.num_experts * matrices_of[moe.experts] * d * moe.expert_dim
  return total + d + 2 * d * vocab_size


PLAIN = [name for name in PRESETS if name.startswith(("mixtral", "qwen3", "gshard", "switch"))]


@pytest.mark.parametrize("name", [*PLAIN, "quick", "default", "long", "tiny"])
def test_presets_have_the_parameters_that_their_sizes_give(name):
  expected = parameters_by_hand(preset(name).check().model, VOCAB_SIZES[name])
  assert account(name).parameters.total == expected


def test_unknown_preset():
  with pytest.raises(InputError, match="unknown preset 'mixtral': did you mean mixtral_8x7b"):
    preset("mixtral")


@pytest.mark.parametrize(
  ("name", "experts", "width", "hidden", "total"),
  # totals: 2006.16668, table 1, and 2101.03961, table 9, in billions
  [("gshard_600b_like", 18 * 2048, 1024, 8192, 619), ("switch_c_like", 30 * 2048, 2080, 6144, 1571)],
)
def test_decoders_like_published_ones_have_their_experts(name, experts, width, hidden, total):
  params = nnx.state(abstract_model(resolve_config(PRESETS[name]), VOCAB_SIZES[name]), nnx.Param)
  sizes = {}
  for path, variable in nnx.to_flat_state(params):
    sizes[path[-1]] = sizes.get(path[-1], 0) + math.prod(variable.get_value().shape)
  assert sizes["w_up_EDF"] == sizes["w_down_EFD"] == experts * width * hidden
  assert sum(sizes.values()) / 1e9 == pytest.approx(total, rel=0.01)
