"""Hugging Face transformers on CPU PyTorch as oracle: tiny modules with our random weights, nothing downloaded.

Importing this module skips the test module where PyTorch or transformers is missing.
"""

import functools
import importlib
import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
INSTALL = "parity tests need the extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=INSTALL)
transformers = pytest.importorskip("transformers", minversion="5.23", reason=INSTALL)
torch.set_num_threads(1)  # tiny sizes; the other cores belong to the other test processes

PREFIX = {
  "mixtral": "Mixtral",
  "qwen2_moe": "Qwen2Moe",
  "qwen3_moe": "Qwen3Moe",
  "olmoe": "Olmoe",
  "gpt_oss": "GptOss",
  "minimax": "MiniMax",
  "deepseek_v2": "DeepseekV2",
  "deepseek_v3": "DeepseekV3",
  "deepseek_v4": "DeepseekV4",
  "axk2": "AXK2",
  "gemma4": "Gemma4Text",
  "llama4": "Llama4Text",
  "longcat_flash": "LongcatFlash",
  "switch_transformers": "SwitchTransformers",
  "nllb_moe": "NllbMoe",
}


@functools.cache
def modeling(model: str):
  """The module `transformers.models.MODEL.modeling_MODEL`."""
  return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def build(model: str, part: str, *args, **fields):
  """A part of a model in evaluation mode, e.g. `build("mixtral", "TopKRouter", hidden_size=8)`.

  `fields` are those of the model's configuration; `args` follow it in the part's constructor.
  """
  config = getattr(transformers, f"{PREFIX[model]}Config")(**fields)
  config._experts_implementation = "eager"
  return getattr(modeling(model), PREFIX[model] + part)(config, *args).eval()


def load(module, **arrays: np.ndarray) -> None:
  """Sets every parameter and buffer of `module`; the names, with dots, must be all that it has.

  Raises:
    RuntimeError: a name that is missing or unknown, or another shape.
  """
  module.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in arrays.items()})


def call(function, *args):
  """`function(*args)` without gradients, arrays in and arrays out; None and numbers stay."""
  to_torch = lambda x: torch.tensor(x) if isinstance(x, np.ndarray) else x
  with torch.no_grad():
    result = function(*map(to_torch, args))
  return tuple(x.numpy() for x in result) if isinstance(result, tuple) else result.numpy()


def normals(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
  return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
