"""The attention kernels of GPU and TPU. Each computes what `moe_jax.ops.attention.attend` does, on one device.

A kernel holds the scores of a tile at a time, in fast memory, also in the backward pass. Products have operands in
bfloat16 or float16 and accumulate in float32, as those of XLA do.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array

SHORTEST = 128  # positions; the tiles of a kernel have at least as many
_TILES = (512, 256, 128)  # of splash attention, the first that divides the length


def kernel_for(
  platform: str,
  query_BLNH: Array,
  key_BLNH: Array,
  value_BLNH: Array,
  *,
  causal: bool = True,
  mask_BL: Array | None = None,
  segment_BL: Array | None = None,
  sink_N: Array | None = None,
) -> str:
  """Returns the kernel that `platform` has for this form of attention: "cudnn" (GPU), "splash" (TPU), or "" for none.

  There is none for float32, where a kernel could be less exact than XLA, and for less than `SHORTEST` positions.

  Args:
    platform: as JAX names it, e.g. "gpu".
    query_BLNH, key_BLNH, value_BLNH, causal, mask_BL, segment_BL, sink_N: as in `moe_jax.ops.attention.attend`.
  """
  arrays, length = (query_BLNH, key_BLNH, value_BLNH), query_BLNH.shape[1]
  width = max(query_BLNH.shape[-1], value_BLNH.shape[-1])
  if len({x.dtype for x in arrays}) > 1 or length < SHORTEST:
    return ""
  if platform == "tpu":
    return "splash" if query_BLNH.dtype == jnp.bfloat16 and length % _TILES[-1] == 0 else ""
  if platform not in ("gpu", "cuda") or query_BLNH.dtype not in (jnp.bfloat16, jnp.float16):
    return ""
  capability = cuda_capability()
  widest = 256 if capability >= 9 else 128 if capability >= 8 else 0
  plain = mask_BL is None and segment_BL is None and sink_N is None
  has_form = causal and plain and width <= widest and width % 8 == 0
  return "cudnn" if has_form else ""


def cuda_capability() -> float:
  """Returns the compute capability of the GPUs here (9.0: Hopper), or 0 if they are not NVIDIA's."""
  device = jax.local_devices(backend="gpu")[0]
  return float(device.compute_capability) if "cuda" in device.client.platform_version else 0.0


def cudnn(
  query_BLNH: Array,
  key_BLNH: Array,
  value_BLNH: Array,
  *,
  window: int = 0,
  pad_B: Array | None = None,
  scale: float | None = None,
) -> Array:
  """Causal attention by cuDNN's kernel, see `moe_jax.ops.attention.attend` for shapes and options.

  The kernel knows no padding. Under a causal mask no real position sees what follows the text, so padding before it
  is rotated behind it. Values that are narrower than queries (latent attention) get columns of zeros.
  """
  width, value_width = query_BLNH.shape[-1], value_BLNH.shape[-1]
  if value_width < width:
    value_BLNH = jnp.pad(value_BLNH, ((0, 0), (0, 0), (0, 0), (0, width - value_width)))
  arrays = [query_BLNH, key_BLNH, value_BLNH]
  if pad_B is not None:
    arrays = [_rotated(x, pad_B) for x in arrays]
  sides = (window - 1, 0) if window else None
  mixed = jax.nn.dot_product_attention(
    *arrays, scale=scale, is_causal=True, local_window_size=sides, implementation="cudnn"
  )
  mixed = mixed[..., :value_width]
  return mixed if pad_B is None else _rotated(mixed, -pad_B)


def _rotated(x_BLNH: Array, by_B: Array) -> Array:
  """Moves position `by_B` of each sequence to the front, and what was before it to the end."""
  length = x_BLNH.shape[1]
  source_BL = (jnp.arange(length)[None] + by_B[:, None]) % length
  return jnp.take_along_axis(x_BLNH, source_BL[:, :, None, None], axis=1)


def splash(
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
  interpret: bool = False,
) -> Array:
  """Attention by JAX's splash kernel for TPU, see `moe_jax.ops.attention.attend` for shapes and options.

  It skips tiles in which no query sees a key. Padding is a segment of its own. `interpret` runs it anywhere, slowly.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as library  # takes a while to import

  length, num_heads, width = query_BLNH.shape[1:]
  shape, side = (length, length), window - 1 if window else None
  if window:
    mask = library.LocalMask(shape, (side, 0 if causal else side), 0)
  else:
    mask = library.CausalMask(shape) if causal else library.FullMask(shape)
  tile = next(size for size in _TILES if length % size == 0)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  kernel = library.make_splash_mha_single_device(
    library.MultiHeadMask([mask] * num_heads),
    block_sizes=library.BlockSizes(**{f"block_{name}": tile for name in names}),
    interpret=interpret,
  )
  if pad_B is not None:
    text_BL = jnp.arange(length)[None] >= pad_B[:, None]
    mask_BL = text_BL if mask_BL is None else mask_BL & text_BL
  if mask_BL is not None:
    texts_BL = jnp.ones_like(mask_BL, jnp.int32) if segment_BL is None else segment_BL
    segment_BL = jnp.where(mask_BL, texts_BL, -1)
  scale = width**-0.5 if scale is None else scale
  query_BLNH = (query_BLNH.astype(jnp.float32) * scale).astype(query_BLNH.dtype)  # the kernel has no scale

  def one_sequence(query_LNH, key_LNH, value_LNH, segment_L):
    arrays = (x.swapaxes(0, 1) for x in (query_LNH, key_LNH, value_LNH))
    segments = None if segment_L is None else library.SegmentIds(segment_L, segment_L)
    return kernel(*arrays, segments, sink_N).swapaxes(0, 1)

  pairs = tile**2 * tiles_seen(length, tile, causal, window)
  with jax.named_scope(
    f"splash_of_{pairs}_pairs"
  ):  # which moe_jax.analysis.flops reads in the compiled program
    return jax.vmap(one_sequence)(query_BLNH, key_BLNH, value_BLNH, segment_BL)


def tiles_seen(length: int, tile: int, causal: bool, window: int) -> int:
  """Returns the number of tiles in which a query sees a key."""
  tiles = np.arange(length // tile)
  behind = tile * (
    tiles[:, None] - tiles[None]
  )  # of first query and first key; others differ by less than a tile
  farthest, nearest = window - 1 if window else length, 0 if causal else 1 - window if window else -length
  return int(((behind + tile > nearest) & (behind - tile < farthest)).sum())
