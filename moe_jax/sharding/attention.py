"""Softmax attention by the kernel of the backend, on every device of a mesh with its own sequences and heads."""

import functools
from typing import Any

import jax
from jax.sharding import AxisType

from moe_jax.ops import attention, attention_kernels
from moe_jax.sharding import rules
from moe_jax.types import Array

_QUERIES, _KEYS = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)


def attend(
  query_BLNH: Array,
  key_BLNH: Array,
  value_BLNH: Array,
  *,
  causal: bool = True,
  window: int = 0,
  mask_BL: Array | None = None,
  pad_B: Array | None = None,
  segment_BL: Array | None = None,
  scale: float | None = None,
  sink_N: Array | None = None,
  kernel: str = "auto",
) -> Array:
  """Returns what `moe_jax.ops.attention.attend` does, in a half type to rounding, and in float32 exactly that.

  Args:
    query_BLNH, key_BLNH, value_BLNH, causal, window, mask_BL, pad_B, segment_BL, scale, sink_N: as
      there.
    kernel: "auto": cuDNN's kernel on a GPU, splash attention on a TPU, where they have this form
      (`moe_jax.ops.attention_kernels.kernel_for`) and the mesh divides sequences and heads. "blocks": of queries, by
      XLA, everywhere.
  """
  arrays, scores = (query_BLNH, key_BLNH, value_BLNH), {"window": window, "scale": scale}
  form = {"causal": causal, "mask_BL": mask_BL, "segment_BL": segment_BL, "sink_N": sink_N}
  name = attention_kernels.kernel_for(rules.platform(), *arrays, **form) if kernel == "auto" else ""
  mesh = jax.sharding.get_abstract_mesh()
  alone = mesh.empty or mesh.size == 1 or all(kind == AxisType.Manual for kind in mesh.axis_types)
  if not name or not (alone or _divides(mesh, query_BLNH, key_BLNH)):
    return attention.attend(*arrays, pad_B=pad_B, **form, **scores)
  run = functools.partial(attention_kernels.cudnn, **scores)
  given = {"pad_B": pad_B}
  if name == "splash":
    run = functools.partial(attention_kernels.splash, causal=causal, **scores)
    given |= {"mask_BL": mask_BL, "segment_BL": segment_BL, "sink_N": sink_N}
  return run(*arrays, **given) if alone else _on_each_device(run, arrays, given)


def _divides(mesh: Any, query_BLNH: Array, key_BLNH: Array) -> bool:
  """Whether every device gets whole sequences, and queries with their keys."""
  if any(kind != AxisType.Auto for kind in mesh.axis_types):
    return False
  size = lambda logical_axis: rules.num_parts(logical_axis, mesh.shape)
  heads = (query_BLNH.shape[2], key_BLNH.shape[2])
  return query_BLNH.shape[0] % size("batch") == 0 and not any(n % size("heads") for n in heads)


def _on_each_device(run: Any, arrays: tuple[Array, ...], given: dict[str, Array | None]) -> Array:
  """Runs a kernel under `jax.shard_map`: XLA cannot divide it."""
  axes = dict.fromkeys(("mask_BL", "segment_BL"), ("batch", None))
  axes |= {"pad_B": ("batch",), "sink_N": ("heads",)}
  given = {name: x for name, x in given.items() if x is not None}
  spec = rules.partition_spec
  of_queries, of_keys = spec(_QUERIES), spec(_KEYS)
  return jax.shard_map(
    lambda arrays, given: run(*arrays, **given),
    in_specs=((of_queries, of_keys, of_keys), {name: spec(axes[name]) for name in given}),
    out_specs=of_queries,
    check_vma=False,
  )(arrays, given)
