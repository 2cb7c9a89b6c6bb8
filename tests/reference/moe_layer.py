"""The MoE layer as slow loops in numpy float64: slots, experts and hand-written gradients.

Shares no code and no method with the package: entries are taken one after the other, and a Python
counter per expert says whether there is room.
"""

import numpy as np


def kept_entries(assignment, capacity):
  """Which entries [G, A] get a slot. `capacity=None`: no limit."""
  valid, expert = np.asarray(assignment.valid_A), np.asarray(assignment.expert_A)
  holds = valid if assignment.holds_slot_A is None else np.asarray(assignment.holds_slot_A)
  kept = np.zeros(valid.shape, bool)
  for g in range(valid.shape[0]):
    taken = {}
    for a in range(valid.shape[1]):
      position = taken.get(expert[g, a], 0)
      kept[g, a] = valid[g, a] and (capacity is None or position < capacity)
      taken[expert[g, a]] = position + int(holds[g, a])
  return kept


def _ffn(x, gate, up, down):
  """One token through one expert: the output and what the backward pass needs."""
  u = x @ up
  if gate is None:
    act, slope, other = np.maximum(u, 0), (u > 0) * 1.0, None
    return act @ down, (act, slope, other)
  g = x @ gate
  sigmoid = 1 / (1 + np.exp(-g))
  return (g * sigmoid * u) @ down, (g * sigmoid * u, sigmoid * (1 + g * (1 - sigmoid)) * u, g * sigmoid)


def moe_layer(x_GTD, assignment, weights, capacity, cotangent_GTD, weighs="output"):
  """Forward and backward of sum(y * cotangent). Weights multiply the output or the input of the experts.

  Returns y_GTD, kept_GA, and a dict of gradients: x, weight (of the entries), gate, up, down.
  """
  x_GTD, cotangent_GTD = np.asarray(x_GTD, np.float64), np.asarray(cotangent_GTD, np.float64)
  gate, up, down = [None if w is None else np.asarray(w, np.float64) for w in weights]
  token, expert = np.asarray(assignment.token_A), np.asarray(assignment.expert_A)
  combine = np.asarray(assignment.weight_A, np.float64)
  kept = kept_entries(assignment, capacity)
  y = np.zeros_like(x_GTD)
  grads = {"x": np.zeros_like(x_GTD), "weight": np.zeros_like(combine)}
  grads |= {
    "gate": None if gate is None else np.zeros_like(gate),
    "up": np.zeros_like(up),
    "down": np.zeros_like(down),
  }
  for g, a in zip(*np.nonzero(kept)):
    t, e = token[g, a], expert[g, a]
    before, after = (combine[g, a], 1) if weighs == "input" else (1, combine[g, a])
    x, d_y, d_x = before * x_GTD[g, t], cotangent_GTD[g, t], 0
    out, (hidden, slope, other) = _ffn(x, None if gate is None else gate[e], up[e], down[e])
    y[g, t] += after * out
    d_out = after * d_y
    grads["down"][e] += np.outer(hidden, d_out)
    d_hidden = down[e] @ d_out
    if gate is None:
      d_up = d_hidden * slope
    else:
      d_gate, d_up = d_hidden * slope, d_hidden * other
      grads["gate"][e] += np.outer(x, d_gate)
      d_x = gate[e] @ d_gate
    grads["up"][e] += np.outer(x, d_up)
    d_x = d_x + up[e] @ d_up
    grads["x"][g, t] += before * d_x
    grads["weight"][g, a] = d_x @ x_GTD[g, t] if weighs == "input" else d_y @ out
  return y, kept, grads
