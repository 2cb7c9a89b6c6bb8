"""Files of a user's own: found, imported once, and named with their line where they fail."""

import pytest

import moe_jax
from moe_jax.errors import InputError
from moe_jax.nn.routers import ROUTERS
from moe_jax.ops.metrics import METRICS, Metric
from moe_jax.plugins import import_plugins

HEAD = "import moe_jax\n\ndef mine(rate: float = 0.1):\n  return moe_jax.Balancer()\n\n"


def plugin(tmp_path, code, name="mine.py"):
  path = tmp_path / name
  path.write_text(HEAD + code)
  return str(path)


def test_what_a_plugin_registers_has_a_name(tmp_path):
  from moe_jax.ops.balancing import BALANCERS

  path = plugin(tmp_path, 'moe_jax.register("balancer", "of_a_plugin", mine)\n')
  import_plugins([path, path])
  assert str(BALANCERS.resolve("of_a_plugin:0.5")) == "of_a_plugin:0.5"


@pytest.mark.parametrize(
  ("code", "message"),
  [
    ("1 / 0\n", r"mine.py:6: ZeroDivisionError"),
    ("def broken(:\n", r"mine.py:6: SyntaxError"),
    ("import no_such_module\n", r"mine.py:6: ModuleNotFoundError"),
    (
      'moe_jax.register("balancer", "switch_loss", mine)\n',
      r"'switch_loss' \(.*mine.py:3\): the name is taken by moe_jax",
    ),
    ('moe_jax.register("balanser", "x", mine)\n', "unknown kind of part 'balanser': did you mean balancer"),
    ('moe_jax.register("router", "x", 7)\n', "router 'x': 7 is no function or class"),
    (
      'moe_jax.register("router", "x", lambda size: 7)\n',
      r"router 'x' \(.*mine.py:6\): takes 'size', which is neither",
    ),
    ('moe_jax.register("metric", "x", mine)\n', "metric 'x': .* is no Metric"),
    ('moe_jax.register("metric", "max_vio", None)\n', "metric 'max_vio'"),
    (
      'moe_jax.register("metric", "nll", moe_jax.Metric(mine, mine))\n',
      "metric 'nll': the name is taken by moe_jax",
    ),
    (
      'moe_jax.register("metric", "seconds", moe_jax.Metric(mine, mine))\n',
      "metric 'seconds': the name is taken by moe_jax",
    ),
    (
      'moe_jax.register("metric", "max_vio_training", moe_jax.Metric(mine, mine))\n',
      "metric 'max_vio_training': the name is taken",
    ),
    (
      'moe_jax.register("metric", "m", moe_jax.Metric(mine, mine, "M", format=",d"))\n',
      "metric 'm': format ',d' is none of a floating-point number",
    ),
    (
      'moe_jax.register("metric", "m", moe_jax.Metric(mine, mine, 3))\n',
      "metric 'm': training is 3; it must be a text",
    ),
    (
      'moe_jax.register("metric", "m", moe_jax.Metric(mine, mine, lower_is_better="yes"))\n',
      "metric 'm': lower_is_better is 'yes'; it must be",
    ),
  ],
)
def test_a_plugin_that_fails_is_named_with_its_line(tmp_path, code, message):
  before = set(ROUTERS)
  with pytest.raises(InputError, match=message) as caught:
    import_plugins([plugin(tmp_path, code)])
  assert str(caught.value).startswith(f"--plugins={tmp_path}/mine.py: ") and "\n" not in str(caught.value)
  assert set(ROUTERS) == before


def test_a_router_of_the_wrong_kind_is_answered_where_it_is_built(tmp_path):
  import_plugins([plugin(tmp_path, 'moe_jax.register("router", "no_router", mine)\n', "kind.py")])
  with pytest.raises(
    InputError, match=r"router 'no_router' \(.*kind.py:3\): makes a Balancer, which is no Router"
  ):
    moe_jax.MoE(8, router="no_router", rngs=None)


def test_files_and_modules_that_are_not_there():
  for name, message in (
    ("no_such.py", "no such file"),
    ("no_such", "no such module; a file is named with its .py"),
  ):
    with pytest.raises(InputError, match=f"--plugins={name}: {message}"):
      import_plugins([name])


def test_public_names_are_there_and_documented():
  for name in moe_jax.__all__:
    assert getattr(moe_jax, name) is not None
    if name != "__version__":
      assert getattr(moe_jax, name).__doc__, name
  assert set(moe_jax.__all__) <= set(dir(moe_jax))


def test_a_metric_of_ones_own_is_in_every_table(tmp_path):
  from moe_jax.training.results import table_columns

  moe_jax.register(
    "metric", "assigned", Metric(lambda layer: layer.tokens_per_expert_BE.sum(), lambda x: x, "Assigned")
  )
  try:
    assert {"key": "assigned_training", "title": "Assigned"}.items() <= table_columns()[-1].items()
  finally:
    del METRICS["assigned"]
