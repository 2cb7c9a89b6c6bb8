"""Configuration: frozen dataclasses of plain values. Methods are named by strings; no code is imported.

Every field is a flag of the experiment scripts with the same name, and `check` answers a wrong value
with one line that names the field.
"""

import dataclasses
from typing import Any

from moe_jax.errors import InputError


def _require(ok: bool, field: str, value: Any, right: str) -> None:
  if not ok:
    raise InputError(f"--{field}={value}: {right}")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """The MoE layer. Methods are `name` or `name:value:option=value`, see `moe_jax.registry`."""

  num_experts: int = 16  # E
  num_experts_per_token: int = 2  # K
  expert_dim: int = 64  # F
  num_shared_experts: int = 0  # always-on experts of width expert_dim beside the routed ones
  expert_activation: str = "swiglu"  # swiglu | relu
  layer: str = "moe"  # moe | soft_moe:SLOTS; what follows is for moe, which routes
  router: str = "softmax_topk"
  balancers: str = "none"  # comma-separated, e.g. switch_loss:0.01,z_loss:0.001
  dispatcher: str = "sorted"  # einsum | sorted | dropless | all_to_all | all_gather
  capacity_factor: float = 1.25  # slots per expert / (T*K/E); ignored by dropless
  eval_capacity_factor: float = 2.0
  group_size: int = 0  # T, tokens per routing group; 0: chosen from the shape
  accept_leaks: str = ""  # routers by name that may look at later tokens in the causal model
  jitter: float = 0.0  # router input times U(1-jitter, 1+jitter) in training, 2101.03961

  def check(self) -> None:
    _require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1 expert")
    k = self.num_experts_per_token
    _require(
      1 <= k <= self.num_experts,
      "num_experts_per_token",
      k,
      f"must be between 1 and num_experts={self.num_experts}",
    )
    _require(self.expert_dim >= 1, "expert_dim", self.expert_dim, "must be positive")
    _require(self.num_shared_experts >= 0, "num_shared_experts", self.num_shared_experts, "0 or more")
    _require(
      self.expert_activation in ("swiglu", "relu"),
      "expert_activation",
      self.expert_activation,
      "swiglu or relu",
    )
    _require(self.capacity_factor > 0, "capacity_factor", self.capacity_factor, "must be above 0, e.g. 1.25")
    _require(
      self.eval_capacity_factor > 0,
      "eval_capacity_factor",
      self.eval_capacity_factor,
      "must be above 0, e.g. 2.0",
    )
    _require(
      self.group_size >= 0, "group_size", self.group_size, "tokens per group, or 0 to choose from the shape"
    )
    _require(0 <= self.jitter < 1, "jitter", self.jitter, "must be in [0, 1), Switch uses 0.01")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The decoder language model. `vocab_size` comes from the data set's tokenizer."""

  num_layers: int = 3
  model_dim: int = 64  # D
  num_heads: int = 4  # N
  num_kv_heads: int = 2  # query heads share key/value heads in groups of N / num_kv_heads
  head_dim: int = 16  # H
  dense_dim: int = 192  # hidden width of the layers without experts
  num_dense_first: int = 0  # the first layers that are dense
  moe_every: int = 1  # of the layers after those, every n-th has experts
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  qk_norm: bool = False  # RMSNorm over the head dimension of queries and keys, as in Qwen3 (2505.09388)
  tie_embeddings: bool = False
  init_scale: float = 1.0  # s in std = sqrt(s / fan_in) of every matrix; Switch, 2101.03961: 0.1
  compute_dtype: str = "float32"  # float32 | bfloat16; parameters and the router stay float32
  scan_layers: bool = True
  remat: str = "full"  # full (on CPU also faster) | exchange: full, but no row travels again | dots | none
  moe: MoEConfig = MoEConfig()

  def check(self) -> None:
    for name in (
      "num_layers",
      "model_dim",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "dense_dim",
      "moe_every",
    ):
      _require(getattr(self, name) >= 1, name, getattr(self, name), "must be positive")
    _require(
      self.num_heads % self.num_kv_heads == 0,
      "num_kv_heads",
      self.num_kv_heads,
      f"must divide num_heads={self.num_heads}",
    )
    _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even for rotary positions")
    _require(
      0 <= self.num_dense_first < self.num_layers,
      "num_dense_first",
      self.num_dense_first,
      f"must leave at least one of num_layers={self.num_layers}",
    )
    rest = self.num_layers - self.num_dense_first
    _require(
      rest % self.moe_every == 0,
      "moe_every",
      self.moe_every,
      f"must divide the {rest} layers after the num_dense_first={self.num_dense_first} dense ones",
    )
    _require(
      self.compute_dtype in ("float32", "bfloat16"),
      "compute_dtype",
      self.compute_dtype,
      "float32 or bfloat16",
    )
    _require(
      self.remat in ("none", "full", "dots", "exchange"), "remat", self.remat, "none, full, dots or exchange"
    )
    _require(self.init_scale > 0, "init_scale", self.init_scale, "must be above 0, Switch uses 0.1")
    self.moe.check()

  @property
  def num_moe_layers(self) -> int:
    return (self.num_layers - self.num_dense_first) // self.moe_every


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with warm-up and a decay to `final_learning_rate_fraction` at the last step."""

  learning_rate: float = 3e-3
  schedule: str = "cosine"  # cosine | linear | constant
  warmup_steps: int = 20
  final_learning_rate_fraction: float = 0.1
  weight_decay: float = 0.1  # on matrices only
  beta1: float = 0.9
  beta2: float = 0.95
  clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off

  def check(self) -> None:
    _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be above 0")
    _require(
      self.schedule in ("cosine", "linear", "constant"),
      "schedule",
      self.schedule,
      "cosine, linear or constant",
    )
    _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
    _require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "must be 0 (off) or more")
    for name in ("beta1", "beta2"):
      _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it is cut into batches."""

  dataset: str = "stdlib"  # stdlib | markov | text_folder | any TFDS text data set, e.g. lm1b, c4/en
  data_dir: str = ""  # where TFDS data sets live; empty: $MOE_JAX_DATA_DIR or ~/.cache/moe_jax
  text_folder: str = ""  # with dataset=text_folder: a folder of text files; its sub-folders are the domains
  tokenizer: str = "bytes"  # bytes, a SentencePiece .model file, or a Hugging Face tokenizer.json
  sequence_length: int = 128  # L
  batch_size: int = 8  # sequences per optimizer step over all processes
  data_seed: int = 0  # order of the training windows; the same for every method that is compared
  # dataset=markov: a mixture of Markov chains with an exactly known entropy rate
  markov_domains: int = 4
  markov_states: int = 64
  markov_temperature: float = 1.0  # of the random transition logits: lower is more predictable

  def check(self) -> None:
    for name in ("sequence_length", "batch_size", "markov_domains", "markov_states"):
      _require(getattr(self, name) >= 1, name, getattr(self, name), "must be positive")
    _require(
      self.markov_temperature > 0, "markov_temperature", self.markov_temperature, "must be above 0, e.g. 1.0"
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop around the steps."""

  num_steps: int = 180
  accumulation: int = 1  # micro-batches per optimizer step
  seed: int = 0  # of the parameters and the router's randomness
  log_every: int = 10
  eval_every: int = 0  # steps between evaluations; 0: only at the end
  eval_batches: int = 0  # 0: the whole validation set
  checkpoint_every: int = 0  # 0: only at the end
  tail_fraction: float = 0.2  # MaxVio per batch is averaged over this last part of training
  tensorboard: bool = True
  record_router_logits: int = 0  # steps between those whose router logits are kept for a replay; 0: none
  router_logits_dtype: str = "float16"  # float16 | float32: of the recorded router logits

  def check(self) -> None:
    for name in ("num_steps", "accumulation", "log_every"):
      _require(getattr(self, name) >= 1, name, getattr(self, name), "must be positive")
    for name in ("eval_every", "eval_batches", "checkpoint_every", "record_router_logits"):
      _require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
    _require(
      self.router_logits_dtype in ("float16", "float32"),
      "router_logits_dtype",
      self.router_logits_dtype,
      "float16 or float32",
    )
    _require(0 < self.tail_fraction <= 1, "tail_fraction", self.tail_fraction, "must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 takes what is left. `sharding.RULES` says what each axis splits."""

  slice: int = 1  # devices along the outer mesh axis, across slices or nodes; -1: what is left
  data: int = -1  # devices that replicate the parameters and split the batch; -1: what is left
  fsdp: int = (
    1  # devices that split the batch, and the parameters and optimizer state along the model dimension
  )
  expert: int = 1  # devices that split the batch and the experts
  tensor: int = 1  # devices that split heads, hidden dimensions (of each expert too) and vocabulary

  def check(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      _require(value == -1 or value >= 1, f"{field.name}_parallelism", value, "must be positive or -1")


@dataclasses.dataclass(frozen=True)
class Config:
  """One training run, whole."""

  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()

  def check(self) -> "Config":
    """Raises `InputError` on the first wrong field; returns itself."""
    for part in (self.model, self.optimizer, self.data, self.train, self.mesh):
      part.check()
    _require(
      self.data.batch_size % self.train.accumulation == 0,
      "accumulation",
      self.train.accumulation,
      f"must divide batch_size={self.data.batch_size}",
    )
    return self

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)
