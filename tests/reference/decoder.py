"""Whole decoders as NumPy loops in float64, from the tensors of a checkpoint by their names."""

import numpy as np


def rms_norm(x, w, eps):
  return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * w


def silu(x):
  return x / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def rotate(x, position, theta, rotary_dim):
  """The first `rotary_dim` entries of a head in pairs (i, i + rotary_dim / 2); the others stay as they are."""
  y, half = x.copy(), rotary_dim // 2
  for i in range(half):
    angle = position * theta ** (-2 * i / rotary_dim)
    a, b = x[i], x[i + half]
    y[i], y[i + half] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
  return y


def attention(w, x_LD, heads, kv_heads, theta, rotary_dim):
  """Causal softmax attention over one sequence. `w(name)` is a tensor of the layer."""
  length = len(x_LD)
  split = lambda name, n: (x_LD @ w(f"{name}.weight").T).reshape(length, n, -1)
  q, k, v = split("q_proj", heads), split("k_proj", kv_heads), split("v_proj", kv_heads)
  out = np.zeros_like(q)
  for h in range(heads):
    g = h // (heads // kv_heads)
    for i in range(length):
      query = rotate(q[i, h], i, theta, rotary_dim)
      scores = [query @ rotate(k[j, g], j, theta, rotary_dim) / np.sqrt(q.shape[-1]) for j in range(i + 1)]
      out[i, h] = softmax(np.array(scores)) @ v[: i + 1, g]
  return out.reshape(length, -1) @ w("o_proj.weight").T


def lightning(w, x_LD, heads, layer, num_layers):
  """Linear attention with decay (2501.08313, section 2.2, and the released code)."""
  length = len(x_LD)
  qkv = silu(x_LD @ w("qkv_proj.weight").T).reshape(length, heads, 3, -1)
  out = np.zeros_like(qkv[:, :, 0])
  for h in range(heads):
    rate = 2 ** (-8 * (h + 1) / heads) * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)
    for i in range(length):
      for j in range(i + 1):
        out[i, h] += np.exp(-rate * (i - j)) * (qkv[i, h, 0] @ qkv[j, h, 1]) * qkv[j, h, 2]
  normed = rms_norm(out.reshape(length, -1), w("norm.weight"), 1e-6)
  gate = 1 / (1 + np.exp(-(x_LD @ w("output_gate.weight").T)))
  return (normed * gate) @ w("out_proj.weight").T


def swiglu(x_LD, gate, up, down):
  return (silu(x_LD @ gate.T) * (x_LD @ up.T)) @ down.T


def moe(router, expert, x_LD, k, renormalize):
  """Softmax top-k. `expert(e, x)` is what an expert makes of a token."""
  y_LD = np.zeros_like(x_LD)
  for i, x in enumerate(x_LD):
    probs = softmax(x @ router.T)
    chosen = np.argsort(-probs, kind="stable")[:k]
    total = probs[chosen].sum() if renormalize else 1.0
    for e in chosen:
      y_LD[i] += probs[e] / total * expert(e, x)
  return y_LD
