"""The pictures show every arm, and are the same for the same numbers."""

import base64
import io
import json
import math

import matplotlib.image
import numpy as np
import pytest

from moe_jax.comparison import report
from moe_jax.comparison.report import canvas, pareto, plots
from moe_jax.errors import InputError
from tests.comparison.made_results import LONG, Page, make_result, write, write_run


def test_every_picture_shows_every_arm_and_is_reproducible(tmp_path):
  all_results = [make_result(arm, seed, nll=1.0 + seed) for arm in ("none", "b") for seed in range(2)]
  for r in all_results:  # or one arm's curves would hide the other's
    r["validation"]["max_vio"] = [1.0, 2.0 + r["seed"] + 3 * (r["arm"] == "b")]
  write_run(tmp_path, all_results)
  for i, path in enumerate(sorted(tmp_path.glob("arms/*/*/metrics.jsonl"))):
    lines = [{"step": s, "loss": 3.0 - s / (9 + i), "max_vio": [1.0 + i, s / 20]} for s in (10, 20, 30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  paths = write(tmp_path, all_results)
  names = ["max_vio", "quality_vs_max_vio", "loss", "load_heatmap", "domain_heatmap"]
  assert list(paths) == ["csv", "differences", "about", "markdown", "html", *names]
  first = {name: paths[name].read_bytes() for name in names}
  images = Page(paths["html"].read_text()).images
  assert [base64.b64decode(i["src"].partition(",")[2]) for i in images] == list(first.values())
  for (name, data), attributes in zip(first.items(), images, strict=True):
    pixels = np.rint(255 * matplotlib.image.imread(io.BytesIO(data))[..., :3]).astype(int)
    height, width = pixels.shape[:2]
    assert (attributes["width"], attributes["height"]) == (str(width), str(height))
    assert 500 < width < 2000 and 250 < height < 1000
    # Colour bars, legends and the names of curves are at the right.
    seen = pixels if "quality" in name else pixels[:, : width // 2]
    colours, areas = np.unique(seen.reshape(-1, 3), axis=0, return_counts=True)
    if "heatmap" in name:
      assert (areas > 2000).sum() >= 6  # shades of the first arm's two rows of four experts, and paper
    else:
      for arm in range(2):
        style = canvas.style(arm)["color"]
        is_arms = (colours == [int(style[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1)
        assert areas[is_arms].sum() > 50, (name, arm)  # letters have few pixels of any one grey
  write(tmp_path, all_results)
  assert {name: paths[name].read_bytes() for name in names} == first


def test_curves_average_layers_and_keep_shared_steps():
  metrics = {
    ("a", 0): [{"step": 1, "x": [1.0, 3.0]}, {"step": 2, "x": [2.0, 2.0]}, {"step": 3, "eval_x": 0.0}],
    ("a", 1): [{"step": 2, "x": [4.0, 4.0]}, {"step": 3, "x": [5.0, 5.0]}],
    ("b", 0): [{"step": 1, "x": 7.0}, {"step": 2, "x": None}],
  }
  curves = plots._curves(metrics, ["a", "b", "c"], "x")
  assert sorted(curves) == [0, 1]
  np.testing.assert_array_equal(curves[0][0], [2])
  np.testing.assert_array_equal(curves[0][1], [[2.0], [4.0]])
  np.testing.assert_array_equal(curves[1][1], [[7.0]])


def a_point(x, y, hollow=False):
  return pareto.Point("arm", np.array([x, y]), None, 1, hollow)


def test_numbers_of_points_do_not_overlap():
  """40 arms of which 30 share a place, as methods that balance alike do."""
  rng = np.random.default_rng(0)
  points = {i: a_point(*rng.normal([1.0, 2.0], 0.02 if i < 30 else 0.5, 2), hollow=i == 3) for i in range(40)}
  ax = canvas.figure(5.6, 5.4).subplots()
  pareto._draw_points(ax, points)
  line = ax.annotate("a line", (1.0, 2.0))
  pareto._number_points(ax, points, [0, 1])
  ax.figure.canvas.draw()
  boxes = [text.get_window_extent() for text in ax.texts]
  assert len(boxes) == 1 + 40 and line in ax.texts
  assert {text.get_text() for text in ax.texts if text.get_weight() == "bold"} == {"1", "2"}
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[:i])


def test_the_front_is_of_arms_that_no_other_beats():
  means = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0], [2.5, 2.5], [1.0, 4.0]])
  assert pareto.front_of(dict(enumerate(means))) == [2, 1, 0]
  assert pareto.front_of({0: means[0]}) == pareto.front_of({0: means[1], 1: means[3]}) == []
  ax = canvas.figure(4, 4).subplots()
  pareto._draw_front(ax, means[[2, 1, 0]])
  assert {tuple(xy) for xy in ax.lines[0].get_xydata()} == {(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)}


@pytest.mark.parametrize("trigram", [2.05, 2.9])
def test_yardsticks_in_view_are_lines_and_others_are_named(trigram):
  ax = canvas.figure(4, 4).subplots()
  ax.plot([0, 1], [2.0, 2.1])
  canvas.draw_yardsticks(ax, {"byte unigram": 4.5, "byte trigram": trigram}, reach=0.5)
  lines = [line.get_ydata()[0] for line in ax.lines[1:]]
  assert lines == ([2.05] if trigram < 2.1 else [])
  assert ("byte trigram 2.90" in ax.get_title("right")) == (trigram > 2.1)
  assert "byte unigram 4.50" in ax.get_title("right") and ax.get_ylim()[1] < 2.3


@pytest.fixture
def saved(monkeypatch):
  """The axes of each picture that would be saved, by its name."""
  found = {}

  def save(figure, path, caption, wide=False):
    found[path.stem] = figure.axes[0]
    return canvas.Plot(path, caption, wide)

  monkeypatch.setattr(canvas, "save", save)
  return found


def test_dense_models_are_lines(tmp_path, saved):
  results = [make_result(arm, 0, perplexity=y, max_vio=[0.0]) for arm, y in (("a", 5.0), ("b", 7.0))]
  results += [make_result("dense", 0, perplexity=6.0, max_vio=[0.0]) | {"model": {"num_experts": [1]}}]
  results += [make_result("mlp", 0, perplexity=6.5)]
  del results[-1]["validation"]["max_vio"]
  pareto.plot_quality(tmp_path, results, report.summarise(results), [])
  ax = saved["quality_vs_max_vio"]
  assert [text.get_text() for text in ax.texts] == ["dense", "mlp"]
  assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def stored(results, **about):
  return report.Stored(report.summarise(results), report.paired_differences(results), about)


ALIKE = {
  "schedule": {"learning_rate": 0.01},
  "slots": "dropless",
  "model": {"num_layers": 2, "model_dim": 16},
}  # what tables in one picture must say


def some_results(means, seeds=3, **more):
  """Results of arms whose mean (MaxVio, perplexity) is given, with a spread over seeds of 0.1 in both."""
  return [
    make_result(arm, s, max_vio=[x + 0.1 * (s - 1)], perplexity=y + 0.1 * (s - 1)) | ALIKE | more
    for arm, (x, y) in means.items()
    for s in range(seeds)
  ]


def test_an_arm_with_a_diverged_seed_is_not_drawn(tmp_path, saved):
  """Its other seeds would make the front: from results, and from the table of them."""
  results = some_results({"none": (3.0, 7.0), "div": (0.5, 4.0), "better": (1.0, 6.0), "best": (2.0, 5.0)})
  results[4] = {
    "arm": "div",
    "seed": 1,
    "diverged": "x",
    "validation": {"nll": "Infinity", "perplexity": "Infinity"},
  }
  for plot in (
    lambda: pareto.plot_quality(
      tmp_path, results, report.summarise(results), report.paired_differences(results)
    ),
    lambda: pareto.plot_tables(tmp_path / "quality_vs_max_vio.png", {"one": stored(results)}),
  ):
    assert plot().caption.endswith("Not drawn, because a seed diverged: div.")
    names = [
      (text.get_text(), text.get_weight()) for text in saved["quality_vs_max_vio"].get_legend().get_texts()
    ]
    assert names == [("none", "normal"), ("better", "bold"), ("best", "bold")]


def test_tables_are_drawn_as_the_results_that_they_were_made_of(tmp_path, saved):
  means = {"none": (3.0, 7.0), "better": (1.0, 6.0), "best": (2.0, 5.0)}
  results = some_results(means)
  drawn = lambda: sorted(
    [*map(float, np.ravel(segment))]
    for collection in saved["quality_vs_max_vio"].collections
    if hasattr(collection, "get_segments")
    for segment in collection.get_segments()
  )
  pareto.plot_quality(tmp_path, results, report.summarise(results), [])
  bars, front = drawn(), [line.get_xydata() for line in saved["quality_vs_max_vio"].lines]
  pareto.plot_tables(tmp_path / "quality_vs_max_vio.png", {"one": stored(results)})
  assert len(bars) == 6  # an error bar in both directions of each of three arms
  np.testing.assert_allclose(drawn(), bars)
  for own, there in zip(saved["quality_vs_max_vio"].lines, front, strict=True):
    np.testing.assert_allclose(own.get_xydata(), there)


def test_a_picture_of_several_tables_has_every_arm_once_and_explains_itself(tmp_path, saved):
  one = some_results({"none": (3.0, 7.0), "both": (2.0, 6.0)})
  two = some_results({"none": (9.0, 9.0), "both": (9.0, 9.0), LONG[:40]: (1.0, 6.5)})
  two += some_results({"broken": (0.5, 4.0)}, fingerprint="other")
  plot = pareto.plot_tables(tmp_path / "pareto.png", {"one": stored(one), "two": stored(two)})
  ax = saved["pareto"]
  assert [(text.get_text(), text.get_weight()) for text in ax.get_legend().get_texts()] == [
    ("none", "normal"),
    ("both", "bold"),
    (LONG[:40], "bold"),  # not cut
    ("broken", "normal"),
  ]
  assert max(np.max(line.get_xydata()) for line in ax.lines) < 8
  said = (
    "Points: means over 3 seeds; bars: one sample standard deviation. Grey line and bold names: the arms that no "
    "other beats in both means. Hollow: not comparable with none."
  )
  (text,) = ax.figure.texts
  assert text.get_text().replace("\n", " ") == said and plot.caption.endswith(said)


@pytest.mark.parametrize(
  ("more", "about", "message"),
  [
    ({"num_steps": 99}, {}, "differ in num_steps, tokens"),
    ({"yardsticks": {"unigram": 4.5}}, {}, "differ in yardsticks"),
    ({"schedule": {"learning_rate": 0.003}}, {}, "differ in learning_rate"),
    ({"slots": "capacity 1.25/2 per group of 128"}, {}, "differ in slots"),
    ({"eval_batches": 4}, {}, "differ in eval_batches"),
    ({"swept": {"fields": ["weight"], "goal": "nll", "seeds": [100]}}, {}, "differ in swept"),
    ({}, {"varies": ["slots"]}, "differ in what varies by design"),
    ({"schedule": {}, "slots": None}, {}, "two does not say its learning_rate, slots"),
  ],
)
def test_tables_that_are_not_alike_are_not_in_one_picture(tmp_path, more, about, message):
  one = stored(some_results({"none": (3.0, 7.0)}))
  two = stored(some_results({"b": (3.0, 7.0)}, **more), **about)
  with pytest.raises(InputError, match=f"tables one and two: {message}; plot them one by one"):
    pareto.plot_tables(tmp_path / "pareto.png", {"one": one, "two": two})


def test_hollow_arms_are_said_to_be_unlike_the_first_arm_of_their_own_table(tmp_path):
  tables = {}
  for name, first in (("one", "none"), ("two", "top2")):
    results = some_results({first: (3.0, 7.0)})
    results += some_results({f"broken in {name}": (1.0, 6.0)}, fingerprint="other")
    tables[name] = stored(results)
  text = pareto.plot_tables(tmp_path / "pareto.png", tables).caption
  assert "Hollow: not comparable with the first arm of its table (none or top2)." in text
  plain = stored(some_results({"first": (2.0, 7.0), "b": (1.0, 8.0)}))
  text = pareto.plot_tables(tmp_path / "pareto.png", {"plain": plain, "two": tables["two"]}).caption
  assert "Hollow: not comparable with top2." in text


@pytest.mark.parametrize(
  ("known", "in_bytes"), [("bits_per_byte", True), ("bytes_per_token", False), ("", False)]
)
def test_axes_are_in_bits_per_byte_where_the_loss_is_one_of_bytes(tmp_path, known, in_bytes, saved):
  """A loss of masked tokens is not, though the bytes of a token are known."""
  numbers = {"bits_per_byte": 2.0} if in_bytes else {"nll": 2.0}
  results = [make_result(arm, 0, **numbers) | ({"bytes_per_token": 2.0} if known else {}) for arm in "ab"]
  metrics = {(arm, 0): [{"step": s, "loss": 3.0} for s in (1, 2)] for arm in "ab"}
  plots.write_plots(tmp_path, results, report.summarise(results), [], metrics)
  assert ("bits per byte" in saved["loss"].get_ylabel()) == in_bytes
  assert ("bits per byte" in saved["quality_vs_max_vio"].get_ylabel()) == in_bytes
  assert saved["loss"].lines[0].get_ydata() == pytest.approx(3 / math.log(2) / 2 if in_bytes else 3.0)
