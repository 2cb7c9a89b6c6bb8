"""Layer by layer, an examination finds the same sums."""

import numpy as np
import pytest

import moe_jax
from moe_jax.analysis.examine.examination import examine
from moe_jax.analysis.examine.streamed import examine_stream
from moe_jax.errors import InputError
from moe_jax.interop.families import FAMILIES, Values
from tests import tiny
from tests.interop.helpers import random_model
from tests.interop.test_families import CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A dense layer and three with experts, whose choices a bias moves."""
  folder = tmp_path_factory.mktemp("v3")
  values = CASES["deepseek_v3"][0] | {"num_hidden_layers": 4}
  moe_jax.save(random_model(FAMILIES["deepseek_v3"].read(Values("config.json", values)), tiny.VOCAB), folder)
  return folder


def test_the_sums_are_those_of_the_whole_model(folder):
  batches = [tiny.make_batch(seed=seed) for seed in (1, 2)]
  whole = examine(moe_jax.load(folder).model, batches, ["code", "prose"], 2)
  found = examine_stream(moe_jax.LayerStream(folder), batches, ["code", "prose"], 2)
  assert found.sizes == whole.sizes and found.sums.next_RXE.shape == (2, 4, 4)
  for name, expected in whole.sums._asdict().items():
    tolerance = {"rtol": 1e-5} if name == "entropy_R" else {"rtol": 0}  # counts are exact
    np.testing.assert_allclose(getattr(found.sums, name), expected, **tolerance, err_msg=name)
  np.testing.assert_array_equal(found.num_tokens_B, whole.num_tokens_B)
  assert [row["max_vio"] for row in found.rows()] == [row["max_vio"] for row in whole.rows()]


def test_a_text_that_is_empty(folder):
  with pytest.raises(InputError, match="examine: the data set has no text"):
    examine_stream(moe_jax.LayerStream(folder), [], ["code"], 2)
