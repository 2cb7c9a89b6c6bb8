"""Token mixers as loops over positions and heads, in float64, written from the papers."""

import numpy as np


def rms_norm(x, scale, eps=1e-6):
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def frequencies(dim, theta):
  """Radians per position of pair i (2104.09864, section 3.2.2)."""
  return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def rotate(x_BLNH, frequency_X, interleaved=False, magnitude=1.0):
  """Each pair as a complex number times magnitude * exp(i * position * frequency), in place of the pair."""
  dim = 2 * len(frequency_X)
  out = np.array(x_BLNH, np.float64)
  for position, i in np.ndindex(x_BLNH.shape[1], dim // 2):
    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
    turned = (out[:, position, :, a] + 1j * out[:, position, :, b]) * np.exp(1j * position * frequency_X[i])
    out[:, position, :, a], out[:, position, :, b] = magnitude * turned.real, magnitude * turned.imag
  return out


def attention(query, key, value, scale, causal=True, window=0, mask_BL=None, sink_N=None):
  """Softmax over the positions that are seen and, if there is one, over the sink, which has no value."""
  batch, length, heads, _ = query.shape
  out = np.zeros((batch, length, heads, value.shape[-1]))
  for b, i, n in np.ndindex(batch, length, heads):
    shared = n // (heads // key.shape[2])
    seen = [
      j
      for j in range(length)
      if (j <= i or not causal) and (not window or abs(i - j) < window) and (mask_BL is None or mask_BL[b, j])
    ]
    if not seen:  # a hidden position, of which nobody reads what comes out
      continue
    scores = [key[b, j, shared] @ query[b, i, n] * scale for j in seen]
    extra = [] if sink_N is None else [sink_N[n]]
    weights = np.exp(np.array(scores + extra) - max(scores + extra))
    out[b, i, n] = weights[: len(seen)] / weights.sum() @ value[b, seen, shared]
  return out


def lightning(query, key, value, rate_N):
  """(outputs, the state behind the last position), by the quadratic formula of 2401.04658, equation 6."""
  batch, length, heads, dim = query.shape
  out, state = np.zeros(value.shape), np.zeros((batch, heads, dim, value.shape[-1]))
  for b, i, n in np.ndindex(batch, length, heads):
    for j in range(i + 1):
      out[b, i, n] += np.exp(-rate_N[n] * (i - j)) * (query[b, i, n] @ key[b, j, n]) * value[b, j, n]
  for b, j, n in np.ndindex(batch, length, heads):
    state[b, n] += np.exp(-rate_N[n] * (length - 1 - j)) * np.outer(key[b, j, n], value[b, j, n])
  return out, state


def decay_rate(head, num_heads, layer, num_layers):
  return 2 ** (-8 * (head + 1) / num_heads) * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)
