"""Configuration of everything around a model: optimizer, data, training loop and mesh."""

import dataclasses
from collections.abc import Sequence

from moe_jax.config.fields import flag, one_of, positive, representable, require
from moe_jax.registry import Spec

_MARKOV_SIZE = 1 << 26  # 512 MiB


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer, and a learning rate that warms up to its peak and then decays to a fraction of it."""

  optimizer: Spec = flag(
    "adamw", "what turns gradients into updates: adamw, or muon for hidden matrices and adamw for the rest"
  )
  learning_rate: float = flag(3e-3, "at the end of the warm-up")
  schedule: str = flag("cosine", "decay after the warm-up: cosine, linear or constant")
  warmup_steps: int = flag(20, "steps in which the learning rate rises, at most half of all")
  final_learning_rate_fraction: float = flag(
    0.1, "what the learning rate has decayed to when training ends / learning_rate"
  )
  weight_decay: float = flag(0.1, "of matrices; norms and vectors do not decay")
  beta1: float = flag(0.9, "decay of Adam's mean of gradients")
  beta2: float = flag(0.95, "decay of Adam's mean of squared gradients")
  clip_norm: float = flag(1.0, "largest norm of the gradient over all parameters; 0 turns clipping off")
  trained: str = flag(
    "all",
    "parameters that are trained, by name or pattern, joined by commas: all, experts, router, ffn, attention, "
    "embedding, *w_up*, or all_but_ before one of these; the others have no optimizer state",
  )

  def check(self) -> None:
    representable(self)
    require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be above 0")
    one_of(self, "schedule", "cosine", "linear", "constant")
    require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
    final = self.final_learning_rate_fraction
    require(0 <= final <= 1, "final_learning_rate_fraction", final, "must be in [0, 1]")
    require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
    require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "must be 0 (off) or more")
    for name in ("beta1", "beta2"):
      require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The data set, its tokenizer, and how text is cut into batches."""

  dataset: str = flag(
    "stdlib",
    "stdlib, stdlib_tasks (prompts with responses), markov, text_folder, or any TFDS text data set, e.g. lm1b, c4/en",
  )
  data_dir: str = flag("", "where TFDS data sets live; empty: $MOE_JAX_DATA_DIR or ~/.cache/moe_jax")
  text_folder: str = flag(
    "", "with dataset=text_folder: a folder of text files; its sub-folders are the domains"
  )
  held_out_tasks: str = flag(
    "", "with dataset=stdlib_tasks: tasks that are only validated, joined by commas, e.g. name,reorder"
  )
  pack_examples: bool = flag(
    False,
    "with prompts: several examples of a task in a row, which do not see each other; False: one per row",
  )
  tokenizer: str = flag(
    "bytes",
    "bytes, bpe:SIZE trained on the data set (e.g. bpe:2048), a SentencePiece .model file, or a Hugging Face "
    "tokenizer.json; markov has ids and needs none",
  )
  sequence_length: int = flag(128, "L, tokens of a sequence")
  batch_size: int = flag(8, "B, sequences per optimizer step over all processes")
  data_seed: int = flag(0, "order of the training windows; the same for every method that is compared")
  markov_domains: int = flag(
    4, "with dataset=markov: Markov chains in the mixture, whose entropy rate is known"
  )
  markov_states: int = flag(64, "with dataset=markov: states of each chain")
  markov_temperature: float = flag(
    1.0, "with dataset=markov: of the transition logits; lower is more predictable"
  )

  def check(self) -> None:
    representable(self, any_size=("data_seed",))
    positive(self, "sequence_length", "batch_size", "markov_domains", "markov_states")
    size = self.markov_domains * self.markov_states**2
    right = f"at most {_MARKOV_SIZE} transition probabilities, markov_domains * markov_states^2, here {size}"
    require(self.dataset != "markov" or size <= _MARKOV_SIZE, "markov_states", self.markov_states, right)
    require(
      self.markov_temperature > 0, "markov_temperature", self.markov_temperature, "must be above 0, e.g. 1.0"
    )
    if self.tokenizer.startswith("bpe:"):
      require(
        self.bpe_size >= 258,
        "tokenizer",
        self.tokenizer,
        "needs a size of at least 258: 256 bytes, bos and pad",
      )

  @property
  def bpe_size(self) -> int:
    """The vocabulary size of a tokenizer that is trained on the data set; 0 for other tokenizers."""
    size = self.tokenizer.removeprefix("bpe:")
    return int(size) if size != self.tokenizer and size.isascii() and size.isdecimal() else 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The objective, the hooks, and the loop around the steps."""

  objective: Spec = flag(
    "next_token",
    "what is trained: next_token, response on prompts with responses, next_tokens with --mtp_depth, "
    "distil:teacher=FOLDER, distil_response on responses, or masked_lm on a bidirectional model",
  )
  hooks: Spec | Sequence[Spec] = flag("", "what else runs after every optimizer step, joined by commas")
  num_steps: int = flag(180, "optimizer steps")
  accumulation: int = flag(1, "micro-batches per optimizer step")
  seed: int = flag(0, "of the parameters and of everything that is drawn in training")
  init_from: str = flag(
    "",
    "the folder of a run whose parameters training starts from, with {seed} for the seed; empty: from random ones",
  )
  log_every: int = flag(10, "steps between lines of metrics.jsonl")
  eval_every: int = flag(0, "steps between evaluations; 0: only at the end")
  eval_batches: int = flag(0, "batches of an evaluation; 0: the whole validation set")
  checkpoint_every: int = flag(0, "steps between checkpoints, beside those of checkpoint_minutes; 0: none")
  checkpoint_minutes: float = flag(
    5.0, "minutes between checkpoints, the first after half a minute; 0: none by time"
  )
  max_minutes: float = flag(
    0.0,
    "minutes after which the run is saved and ends with exit status 75; the same command continues; 0: no limit",
  )
  ignore_memory_check: bool = flag(False, "start also if parameters and activations cannot fit into memory")
  tail_fraction: float = flag(0.2, "the last part of training that MaxVio per batch is averaged over")
  tensorboard: bool = flag(True, "write TensorBoard event files, too")
  record_router_logits: int = flag(
    0, "steps between those whose router logits are kept for a replay; 0: none"
  )
  router_logits_dtype: str = flag("float16", "of recorded router logits: float16 or float32")

  def check(self) -> None:
    representable(self)
    positive(self, "num_steps", "accumulation", "log_every")
    for name in ("seed", "eval_every", "eval_batches", "checkpoint_every", "record_router_logits"):
      require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
    one_of(self, "router_logits_dtype", "float16", "float32")
    for name in ("checkpoint_minutes", "max_minutes"):
      require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
    require(0 < self.tail_fraction <= 1, "tail_fraction", self.tail_fraction, "must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis.

  One axis may be -1 and takes the rest. `sharding.RULES` says what each axis splits.
  """

  slice: int = flag(1, "devices along the outer mesh axis, across slices or nodes; -1: what is left")
  data: int = flag(-1, "devices that replicate the parameters and split the batch; -1: what is left")
  fsdp: int = flag(
    1, "devices that split the batch, and parameters and optimizer state along the model dimension"
  )
  expert: int = flag(1, "devices that split the batch and the experts")
  tensor: int = flag(1, "devices that split heads, hidden dimensions (of each expert, too) and vocabulary")

  def check(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      require(value == -1 or value >= 1, f"{field.name}_parallelism", value, "must be positive or -1")
