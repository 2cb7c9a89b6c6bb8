"""Configuration of a model: blocks of a token mixer and a feed-forward part, with or without experts."""

import dataclasses
from collections.abc import Sequence

from moe_jax.config.fields import flag, one_of, positive, representable, require
from moe_jax.registry import Spec


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """A feed-forward part with experts.

  Methods are text, `name` or `name:value:option=value` (see `moe_jax.registry`), or the functions and classes
  themselves.
  """

  num_experts: int = flag(16, "E, experts of a layer")
  num_experts_per_token: int = flag(2, "K, experts that a token is sent to")
  expert_dim: int = flag(64, "F, hidden width of an expert")
  num_shared_experts: int = flag(0, "always-on experts beside the routed ones")
  shared_expert_dim: int = flag(0, "hidden width of a shared expert; 0: expert_dim")
  shared_expert_gate: bool = flag(
    False, "a token scales what its shared experts add by the sigmoid of a learned projection, as in Qwen"
  )
  shared_experts: Spec = flag(
    "mlp", "network of the shared experts: mlp, or low_rank, which adds adapters to it"
  )
  experts: Spec = flag(
    "swiglu",
    "network of the experts: swiglu, relu, gelu, clipped_swiglu, bounded_swiglu, expert_dropout, low_rank, "
    "quantised, quantised_training, fp8_products",
  )
  router: Spec = flag("softmax_topk", "what chooses the experts of a token, e.g. sigmoid_topk:normalize=true")
  balancers: Spec | Sequence[Spec] = flag(
    "none", "what keeps experts evenly loaded, joined by commas, e.g. switch_loss:0.01,z_loss:0.001"
  )
  dispatcher: Spec = flag(
    "dropless", "how tokens get to experts: dropless; with a capacity: einsum, sorted, all_to_all, all_gather"
  )
  capacity_factor: float = flag(1.25, "slots per expert / (T*K/E) in training; ignored by dropless")
  eval_capacity_factor: float = flag(2.0, "slots per expert / (T*K/E) in evaluation")
  group_size: int = flag(0, "T, tokens per routing group; 0: chosen from the shape")
  accept_leaks: str = flag("", "routers, by name, that may look at later tokens in a causal model")
  jitter: float = flag(0.0, "router input times U(1-jitter, 1+jitter) in training (Switch, 2101.03961: 0.01)")

  def check(self) -> None:
    representable(self)
    k = self.num_experts_per_token
    require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1 expert")
    require(
      1 <= k <= self.num_experts,
      "num_experts_per_token",
      k,
      f"must be between 1 and num_experts={self.num_experts}",
    )
    positive(self, "expert_dim")
    require(self.num_shared_experts >= 0, "num_shared_experts", self.num_shared_experts, "0 or more")
    require(
      self.shared_expert_dim >= 0, "shared_expert_dim", self.shared_expert_dim, "0 (expert_dim) or more"
    )
    for name, default in (("shared_expert_dim", 0), ("shared_expert_gate", False), ("shared_experts", "mlp")):
      require(
        self.num_shared_experts > 0 or str(getattr(self, name)) == str(default),
        name,
        getattr(self, name),
        "needs shared experts, e.g. --num_shared_experts=1",
      )
    for name, example in (("capacity_factor", 1.25), ("eval_capacity_factor", 2.0)):
      require(getattr(self, name) > 0, name, getattr(self, name), f"must be above 0, e.g. {example}")
    require(
      self.group_size >= 0, "group_size", self.group_size, "tokens per group, or 0 to choose from the shape"
    )
    require(0 <= self.jitter < 1, "jitter", self.jitter, "must be in [0, 1), Switch uses 0.01")

  @property
  def shared_width(self) -> int:
    """The hidden units of all shared experts of a layer, which are one network."""
    return self.num_shared_experts * (self.shared_expert_dim or self.expert_dim)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """One block: a token mixer, a feed-forward part, and how both are added to the residual stream."""

  mixer: Spec = "attention"
  ffn: Spec = "moe"
  residual: Spec = "pre_norm"
  moe: MoEConfig | None = None  # None: `ModelConfig.moe`


@dataclasses.dataclass(frozen=True)
class Segment:
  """A pattern of blocks, repeated.

  The parameters of all repetitions are stacked, and the program loops over them.
  """

  pattern: tuple[BlockConfig, ...]
  repeats: int = 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The language model. The size of the vocabulary comes from the tokenizer of the data set."""

  num_layers: int = flag(3, "blocks, each a token mixer and a feed-forward part")
  model_dim: int = flag(64, "D, width of the residual stream")
  num_heads: int = flag(4, "N, heads of the queries")
  num_kv_heads: int = flag(2, "heads of keys and values, each shared by num_heads / num_kv_heads query heads")
  head_dim: int = flag(16, "H, width of a head")
  dense_dim: int = flag(192, "hidden width of the blocks without experts")
  activation: str = flag(
    "swiglu", "of dense feed-forward parts and shared experts: swiglu, bounded_swiglu, relu or gelu"
  )
  num_dense_first: int = flag(0, "the first blocks that have no experts")
  moe_every: int = flag(1, "of the blocks after those, every n-th has experts")
  mixer: Spec = flag(
    "attention",
    "token mixer of every block: attention, mla, lightning, with options, e.g. attention:window=128",
  )
  ffn: Spec = flag(
    "moe",
    "feed-forward part of the blocks with experts: moe, latent_moe:WIDTH, default_moe, erc_moe, soft_moe:SLOTS, parallel_moe",
  )
  residual: Spec = flag(
    "pre_norm",
    "how parts meet the residual stream: pre_norm, normed_input:ALPHA:BETA; either with dropout of what parts add, e.g. "
    "pre_norm:dropout=0.1",
  )
  rope_theta: float = flag(10_000.0, "base of the rotary positions (2104.09864)")
  norm_eps: float = flag(1e-6, "added to the mean square in RMSNorm")
  qk_norm: bool = flag(False, "RMSNorm over the head dimension of queries and keys, as in Qwen3 (2505.09388)")
  mtp_depth: int = flag(
    0,
    "modules of multi-token prediction behind the stack, as in DeepSeek-V3; --objective=next_tokens trains them",
  )
  tie_embeddings: bool = flag(False, "use the embedding as the output matrix, too")
  init_scale: float = flag(1.0, "s in std = sqrt(s / fan_in) of every matrix (Switch, 2101.03961: 0.1)")
  compute_dtype: str = flag("float32", "float32 or bfloat16; parameters and the router stay float32")
  scan_layers: bool = flag(True, "loop over repeated blocks instead of compiling each")
  remat: str = flag(
    "full",
    "what the backward pass recomputes: full (on CPU also faster), exchange (full, but no row travels twice), "
    "dots (all but products), none",
  )
  moe: MoEConfig = MoEConfig()
  dense_ffn: Spec = "mlp"  # feed-forward part of the blocks without experts
  causal: bool = True  # set by the objective; False: every position attends to all others
  # The blocks, for models that the fields above cannot describe. Empty: made from num_layers, num_dense_first,
  # moe_every, mixer, ffn and residual.
  segments: tuple[Segment, ...] = ()

  def check(self) -> None:
    representable(self)
    positive(
      self, "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "dense_dim", "moe_every"
    )
    require(
      self.num_heads % self.num_kv_heads == 0,
      "num_kv_heads",
      self.num_kv_heads,
      f"must divide num_heads={self.num_heads}",
    )
    require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even for rotary positions")
    require(self.mtp_depth >= 0, "mtp_depth", self.mtp_depth, "modules behind the stack, or 0")
    one_of(self, "compute_dtype", "float32", "bfloat16")
    one_of(self, "activation", "swiglu", "bounded_swiglu", "relu", "gelu")
    one_of(self, "remat", "none", "full", "dots", "exchange")
    require(self.init_scale > 0, "init_scale", self.init_scale, "must be above 0, Switch uses 0.1")
    require(self.norm_eps >= 0, "norm_eps", self.norm_eps, "must be 0 or more, e.g. 1e-6")
    require(self.rope_theta > 0, "rope_theta", self.rope_theta, "must be above 0, e.g. 10000")
    self.moe.check()
    if self.segments:
      self._check_segments()
    else:
      self._check_pattern()

  def _check_pattern(self) -> None:
    require(
      0 <= self.num_dense_first < self.num_layers,
      "num_dense_first",
      self.num_dense_first,
      f"must leave at least one of num_layers={self.num_layers}",
    )
    rest = self.num_layers - self.num_dense_first
    require(
      rest % self.moe_every == 0,
      "moe_every",
      self.moe_every,
      f"must divide the {rest} layers after the num_dense_first={self.num_dense_first} dense ones",
    )

  def _check_segments(self) -> None:
    for name in ("num_layers", "num_dense_first", "moe_every", "mixer", "ffn", "residual"):
      value, default = getattr(self, name), getattr(ModelConfig, name)
      require(str(value) == str(default), name, value, "the model's segments say its blocks; change those")
    for segment in self.segments:
      require(bool(segment.pattern), "segments", segment, "a segment needs at least one block")
      require(segment.repeats >= 1, "segments", segment.repeats, "a segment is repeated at least once")
    for moe in self.moe_configs:
      moe.check()

  @property
  def blocks(self) -> tuple[Segment, ...]:
    """The segments of the model.

    Those of the short fields are expanded, and every block has its own `MoEConfig`.
    """
    segments = self.segments or self._segments_of_pattern()
    own = lambda block: block if block.moe is not None else dataclasses.replace(block, moe=self.moe)
    return tuple(Segment(tuple(own(b) for b in s.pattern), s.repeats) for s in segments)

  @property
  def total_layers(self) -> int:
    """The number of blocks, also of a model whose segments say them."""
    return sum(segment.repeats * len(segment.pattern) for segment in self.blocks)

  def _segments_of_pattern(self) -> tuple[Segment, ...]:
    sparse = BlockConfig(self.mixer, self.ffn, self.residual)
    dense = dataclasses.replace(sparse, ffn=self.dense_ffn)
    period = (dense,) * (self.moe_every - 1) + (sparse,)
    first = (Segment((dense,), self.num_dense_first),) if self.num_dense_first else ()
    return (*first, Segment(period, (self.num_layers - self.num_dense_first) // self.moe_every))

  @property
  def last_block(self) -> BlockConfig:
    """The block of the last layer, which those of multi-token prediction are like."""
    return self.blocks[-1].pattern[-1]

  @property
  def moe_configs(self) -> tuple[MoEConfig, ...]:
    """The different `MoEConfig`s of the blocks."""
    return tuple(dict.fromkeys(block.moe for segment in self.blocks for block in segment.pattern))
