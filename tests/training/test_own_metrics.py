"""Wrong metrics of a user's own: one line that names the metric, before anything is compiled."""

import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.errors import InputError
from moe_jax.ops.metrics import METRICS, Metric
from moe_jax.training.compiled import check_run
from moe_jax.training.own_metrics import check_own_metrics
from tests import tiny

counts = lambda layer: layer.tokens_per_expert_BE.sum(axis=0)
HERE = r"test_own_metrics.py:\d+\)"


@pytest.mark.parametrize(
  ("sums", "read", "message"),
  [
    (
      counts,
      lambda c: c[0] / c.sum(),
      rf"\(.*{HERE}: read makes float32\[8\] of the sums of 3 layers; it must keep",
    ),
    (counts, lambda c: c.max(), rf"\(.*{HERE}: read makes float32\[\] of the sums of 3 layers"),
    (counts, lambda c: c.max(axis=0), r".*: read makes float32\[8\] of the sums of 3 layers"),
    (counts, lambda c: (c, c), r".*: read returns a value of type tuple; it must return an array"),
    (counts, lambda c: np.max(np.asarray(c)), rf": read \(.*{HERE}: fails: TracerArrayConversionError"),
    (
      lambda layer: np.asarray(layer.mask_BL),
      np.sum,
      rf": sums \(.*{HERE}: fails: TracerArrayConversionError",
    ),
    (lambda layer: layer.mask_BL.any(), lambda x: x, r".*: sums returns bool\[\]; it must be of"),
    (lambda layer: layer.mask_BL.sum() * 1j, lambda x: x, r".*: sums returns complex64\[\]; it must be of"),
    (counts, lambda c: c[..., 0] > 0, r".*: read returns bool\[3\]; it must be of"),
    (counts, lambda c: c, r".*: read makes \[3, 8\] of the sums of 3 layers, and a column of a table has"),
  ],
)
def test_a_wrong_metric_is_named(monkeypatch, sums, read, message):
  monkeypatch.setitem(METRICS, "mine", Metric(sums, read, "Mine"))
  with pytest.raises(InputError, match=f"^metric mine:? ?{message}") as error:
    check_run(tiny.CONFIG, sharding.make_mesh(tiny.ONE_DEVICE))
  assert "\n" not in str(error.value)


def test_right_ones_pass(monkeypatch):
  monkeypatch.setitem(METRICS, "share", Metric(counts, lambda c: c[..., 0] / c.sum(axis=-1), "Share"))
  for name, metric in list(METRICS.items()):  # and those of the package, under names that are none of its own
    monkeypatch.setitem(METRICS, f"own_{name}", metric)
  monkeypatch.setitem(METRICS, "all_loads", Metric(counts, lambda c: c, "", ""))
  for num_experts in (3, 5, 8):  # also as many as there are layers in the trial
    check_own_metrics(num_experts, batch=2, length=4)


def test_as_many_experts_as_layers_do_not_hide_a_wrong_one(monkeypatch):
  monkeypatch.setitem(METRICS, "mine", Metric(counts, lambda c: c.sum(axis=0), "Mine"))
  for num_experts in (3, 5):
    with pytest.raises(InputError, match=r"of the sums of \d layers; it must keep"):
      check_own_metrics(num_experts, batch=2, length=4)
