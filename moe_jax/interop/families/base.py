"""What a family of published models is here: its config.json, and the names of its tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import BlockConfig, ModelConfig
from moe_jax.errors import InputError
from moe_jax.interop.source import Names, source

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of published models.

  Args:
    model_type: of its config.json.
    architecture: the class of transformers that loads it.
    read: from the values of a config.json to a configuration. Raises InputError for what this package lacks.
    write: from a configuration to these values. What it cannot express, `read` does not return.
    names: from a configuration and one of its blocks to the tensors of the parameters, also those outside of blocks.
    skipped: a regular expression for names of tensors that follow from others, and are not loaded.
    mtp_depth: from the values of a config.json to the number of modules of multi-token prediction.
    copies: from a configuration to tensors that a checkpoint has twice: the name of the copy, and that of the tensor.
    float32: ends of names of tensors that are written in float32, whatever the type of the others.
    other_types: further values of `model_type` for the same architecture.
  """

  model_type: str
  architecture: str
  read: Callable[["Values"], ModelConfig]
  write: Callable[[ModelConfig], dict[str, Any]]
  names: Callable[[ModelConfig, BlockConfig], Names]
  skipped: str = ""
  mtp_depth: Callable[["Values"], int] = lambda values: 0
  copies: Callable[[ModelConfig], dict[str, str]] = lambda config: {}
  float32: tuple[str, ...] = ()
  other_types: tuple[str, ...] = ()


class Values:
  """The values of a config.json, with errors that name it."""

  def __init__(self, where: str, values: Mapping[str, Any]):
    self.where, self.values = where, values

  def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
    """Returns a value. null counts as missing. Raises `InputError` if it is missing and has no default."""
    value = self.values.get(name)
    if value is None:
      value = default
    if value is _REQUIRED:
      raise InputError(f"{self.where}: {name} is missing")
    return value

  def assuming(self, **values: Any) -> "Values":
    """Returns these values with others where there are none: what the config class of the family has in transformers.

    Only for values that no name or shape of a tensor reveals. A null stays: it says that there is nothing.
    """
    return Values(self.where, values | dict(self.values))

  def boolean(self, name: str, default: bool) -> bool:
    """Returns true or false. Raises `InputError` for anything else: Python would take a text for true."""
    value = self(name, default)
    if not isinstance(value, bool):
      raise InputError(f"{self.where}: {name}={repr(value)[:60]}: must be true or false")
    return value

  def first_of(self, *names: str) -> Any:
    """Returns the value of the first of `names` that is there: versions of transformers name some fields differently."""
    return self(next((name for name in names if self.values.get(name) is not None), names[0]))

  def must_be(self, name: str, *allowed: Any) -> None:
    """Raises `InputError` unless a value, if there is one, is one of `allowed`, of which the first is the default."""
    value = self(name, allowed[0])
    if value not in allowed:
      right = " or ".join(repr(choice) for choice in allowed)
      raise InputError(f"{self.where}: {name}={value!r} is not supported here, only {right}")

  @property
  def rope(self) -> dict[str, Any]:
    """What transformers reads: rope_scaling if it is there, alone, and otherwise rope_parameters, which 5 writes.

    Raises:
      InputError: if rope_parameters has another base than what is read.
    """
    parameters = self("rope_parameters", {})
    scaling = dict(self("rope_scaling", {}) or parameters)
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    if scaling.get("rope_theta") is None:
      scaling["rope_theta"] = self("rope_theta")
    theta, lost = scaling["rope_theta"], dict(parameters).get("rope_theta")
    if lost is not None and lost != theta:  # transformers takes the default of the family, which nobody meant
      raise InputError(
        f"{self.where}: rope_parameters has rope_theta={lost!r}, and rope_scaling, which is read in its place, has "
        f"{theta!r}; put the right rope_theta into rope_scaling"
      )
    return scaling

  @property
  def rope_theta(self) -> float:
    """The base of rotary positions that are not scaled. Raises `InputError` for scaled ones."""
    if self.rope["rope_type"] != "default":
      raise InputError(f"{self.where}: rope_type={self.rope['rope_type']!r} is not supported for this model")
    return float(self.rope["rope_theta"])

  @property
  def compute_dtype(self) -> str:
    """bfloat16 if the weights are, and otherwise float32."""
    return "bfloat16" if self("dtype", self("torch_dtype", "float32")) == "bfloat16" else "float32"


def option(name: str, **options: Any) -> str:
  """Returns the text of a method, without options that are None."""
  text = lambda value: str(value).lower() if isinstance(value, bool) else str(value)
  return ":".join([name, *(f"{key}={text(value)}" for key, value in options.items() if value is not None)])


MODEL: Names = {
  "embedding_VD": source("model.embed_tokens.weight", "V D -> V D"),
  "final_norm.scale_D": source("model.norm.weight", "D -> D"),
  "w_head_DV": source("lm_head.weight", "V D -> D V"),
  "mixer_residual.norm.scale_D": source("input_layernorm.weight", "D -> D"),
  "ffn_residual.norm.scale_D": source("post_attention_layernorm.weight", "D -> D"),
}
ATTENTION: Names = {
  "mixer.w_query_DNH": source("self_attn.q_proj.weight", "(N H) D -> D N H"),
  "mixer.w_key_DNH": source("self_attn.k_proj.weight", "(N H) D -> D N H"),
  "mixer.w_value_DNH": source("self_attn.v_proj.weight", "(N H) D -> D N H"),
  "mixer.w_out_NHD": source("self_attn.o_proj.weight", "D (N H) -> N H D"),
  "mixer.b_query_NH": source("self_attn.q_proj.bias", "(N H) -> N H"),
  "mixer.b_key_NH": source("self_attn.k_proj.bias", "(N H) -> N H"),
  "mixer.b_value_NH": source("self_attn.v_proj.bias", "(N H) -> N H"),
  "mixer.b_out_D": source("self_attn.o_proj.bias", "D -> D"),
  "mixer.query_norm.scale_D": source("self_attn.q_norm.weight", "D -> D"),
  "mixer.key_norm.scale_D": source("self_attn.k_norm.weight", "D -> D"),
  "mixer.sink_N": source("self_attn.sinks", "N -> N"),
}


def swiglu(ours: str, theirs: str) -> Names:
  """The matrices of one dense SwiGLU network, such as shared experts."""
  return {
    f"{ours}.w_gate_DF": source(f"{theirs}.gate_proj.weight", "F D -> D F"),
    f"{ours}.w_up_DF": source(f"{theirs}.up_proj.weight", "F D -> D F"),
    f"{ours}.w_down_FD": source(f"{theirs}.down_proj.weight", "D F -> F D"),
  }


def experts(theirs: str, gate: str, up: str, down: str) -> Names:
  """The matrices of SwiGLU experts: one tensor for each, or packed as transformers 5 has them in memory."""
  packed = "mlp.experts"
  return {
    "ffn.experts.w_gate_EDF": source(f"{theirs}.{{e}}.{gate}.weight", "F D -> D F")
    + source(f"{packed}.gate_up_proj", "E (i F) D -> E D F", i=(0, 2)),
    "ffn.experts.w_up_EDF": source(f"{theirs}.{{e}}.{up}.weight", "F D -> D F")
    + source(f"{packed}.gate_up_proj", "E (i F) D -> E D F", i=(1, 2)),
    "ffn.experts.w_down_EFD": source(f"{theirs}.{{e}}.{down}.weight", "D F -> F D")
    + source(f"{packed}.down_proj", "E D F -> E F D"),
  }


QWEN_EXPERTS = experts("mlp.experts", "gate_proj", "up_proj", "down_proj")
ROUTER: Names = {"ffn.router.w_router_DE": source("mlp.gate.weight", "E D -> D E")}
