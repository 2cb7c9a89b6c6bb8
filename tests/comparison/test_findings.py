"""Published claims on stored tables: which difference, in which direction, corrected over all of them."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import ttest_rel

from moe_jax.comparison import findings
from moe_jax.comparison.findings import Finding, markdown, read_findings, verdict
from moe_jax.comparison.report import read_stored
from moe_jax.errors import InputError
from tests.comparison.made_results import make_result, write

NOISE = {
  arm: 0.01 * np.random.default_rng(i).normal(size=5)
  for i, arm in enumerate(("none", "loss", "bias", "wide"))
}
MEANS = {"none": 2.0, "loss": 1.9, "bias": 1.8, "wide": 1.5}
VALUES = {arm: MEANS[arm] + NOISE[arm] for arm in MEANS}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
  results = [
    make_result(arm, seed, perplexity=float(VALUES[arm][seed]))
    | {"active_width": 64 if arm == "wide" else 32}
    for arm in VALUES
    for seed in range(5)
  ]
  folder = tmp_path_factory.mktemp("one")
  write(folder, results)
  return {"one": read_stored(folder)}


def claim(arm="bias", against="loss", expected="lower", **fields):
  return Finding("Claim.", "source", "figure", "one", arm, against, "perplexity", expected, **fields)


def test_the_difference_of_any_two_arms_is_that_of_the_paired_test(tables):
  claims = [claim(), claim("none", "bias", "lower"), claim("loss", "none", "higher")]
  for finding, d in zip(claims, findings.tested(claims, tables), strict=True):
    one, other = VALUES[finding.arm], VALUES[finding.against]
    exact = ttest_rel(one, other)
    np.testing.assert_allclose(d.mean, np.mean(one - other), rtol=1e-9)
    np.testing.assert_allclose(d.p_value, exact.pvalue, rtol=1e-6)
    np.testing.assert_allclose(d.interval, exact.confidence_interval(0.95), rtol=1e-6)


def test_a_claim_about_an_arm_with_a_diverged_seed_has_no_verdict(tmp_path):
  results = [
    make_result(arm, seed, max_vio=[x + seed / 100]) for arm, x in MEANS.items() for seed in range(5)
  ]
  results[7] |= {"diverged": "a reason"}
  write(tmp_path, results)
  about_vio = lambda arm, against: dataclasses.replace(claim(arm, against), quantity="max_vio")
  claims = [about_vio("loss", "none"), about_vio("bias", "loss"), about_vio("bias", "none")]
  found = zip(claims, findings.tested(claims, {"one": read_stored(tmp_path)}), strict=True)
  lost = "no verdict: diverged: loss seed 2"
  assert [verdict(*of) for of in found] == [lost, lost, "**reproduced**"]


def test_verdicts_follow_the_direction_and_the_correction(tables):
  claims = [
    claim(),
    claim(expected="higher"),
    claim("wide", "none"),
    claim("wide", "none", varies=["active width"]),
  ]
  words = [verdict(c, d) for c, d in zip(claims, findings.tested(claims, tables), strict=True)]
  assert words == ["**reproduced**", "**contradicted**", "not comparable: active width", "**reproduced**"]
  alone = findings.tested([claim()], tables)[0].p_value
  many = findings.tested([claim()] * int(0.06 / alone), tables)  # each of so many is one by chance
  assert {verdict(claim(), d) for d in many} == {"not resolved"}


def test_the_table_has_the_numbers_and_their_place(tables):
  page = markdown([claim()], tables)
  mean = np.mean(VALUES["bias"] - VALUES["loss"])
  assert f"`bias` minus `loss`: {mean:+.3f} [" in page and "5 seeds (`one`) | **reproduced** |" in page


def test_wrong_claims_are_one_line(tables, tmp_path):
  with pytest.raises(InputError, match="table one: has no perplexity of other"):
    findings.tested([claim("other")], tables)
  for text, message in (
    ('claim = "x"', "finding 1: missing .* required"),
    ('arms = "x"', "finding 1: got an unexp"),
  ):
    (tmp_path / "claims.toml").write_text(f"[[finding]]\n{text}\n")
    with pytest.raises(InputError, match=message):
      read_findings(tmp_path / "claims.toml")
