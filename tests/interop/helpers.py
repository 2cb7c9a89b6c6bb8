"""A tiny random model of every family, and how models and folders are compared."""

import jax
import numpy as np
from flax import nnx


def assert_same_model(one, other):
  """All variables are equal, bit for bit."""
  states = [nnx.to_flat_state(nnx.state(model)) for model in (one, other)]
  for (path, a), (_, b) in zip(*states, strict=True):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y, err_msg=str(path))
