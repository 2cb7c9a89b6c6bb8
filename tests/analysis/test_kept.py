"""Numbers that are measured once: of which settings they are, damage, and two commands."""

import json

import pytest

from moe_jax import locks
from moe_jax.analysis.kept import Kept
from moe_jax.errors import InputError
from moe_jax.ops.balancing import Balancer
from tests import tiny

SETTINGS = {"format": "int8", "seed": 0}


def never():
  raise AssertionError("is kept")


@pytest.fixture
def folder(tmp_path):
  """With one row."""
  folder = tmp_path / "run"
  assert Kept(folder, SETTINGS)("rows/a", lambda: {"loss": 1.0}) == {"loss": 1.0}
  return folder


def test_numbers_are_measured_once(folder):
  assert Kept(folder, SETTINGS)("rows/a", never) == {"loss": 1.0}
  assert (folder / locks.LOCK).read_text() == ""


def test_settings_are_there_while_the_first_number_is_made(tmp_path):
  def killed():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    Kept(tmp_path, SETTINGS)("a", killed)
  with pytest.raises(InputError, match=r"settings \(format was 'int8', now 'int4'\); choose another folder"):
    Kept(tmp_path, SETTINGS | {"format": "int4"})
  assert Kept(tmp_path, SETTINGS)("a", dict) == {}


def test_settings_that_are_wrong_can_be_corrected(tmp_path):
  def wrong():
    raise InputError("--format=int5: unknown")

  with pytest.raises(InputError, match="int5"):
    Kept(tmp_path, SETTINGS | {"format": "int5"})("a", wrong)
  assert Kept(tmp_path, SETTINGS)("a", dict) == {}
  with pytest.raises(InputError, match="int5"):
    Kept(tmp_path, SETTINGS)("b", wrong)
  with pytest.raises(InputError, match="holds numbers of other settings"):  # as "a" is there
    Kept(tmp_path, SETTINGS | {"format": "int4"})


@pytest.mark.parametrize("content", [None, '{"form', "[]", '{"format": "int4", "seed": 7, "digest": "0"}'])
def test_numbers_of_other_settings_are_refused_without_settings_json(folder, content, capsys):
  path = folder / "settings.json"
  path.unlink()
  if content:
    path.write_text(content)
  kept = Kept(folder, SETTINGS | {"format": "int4"})
  with pytest.raises(InputError, match=r"holds numbers of other settings \(format was 'int8', now 'int4'\)"):
    kept("rows/a", never)
  assert Kept(folder, SETTINGS)("rows/a", never) == {"loss": 1.0}
  assert ("settings.json: is damaged, moved to" in capsys.readouterr().err) == bool(content)
  assert not content or (folder / "damaged/settings.json-1").read_text() == content


@pytest.mark.parametrize("change", [{"loss": 2.0}, {"settings": {}}, {"digest": None}, {"settings": None}])
def test_damaged_numbers_are_measured_again(folder, change, capsys):
  path = folder / "rows/a.json"
  value = json.loads(path.read_text()) | change
  path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
  assert Kept(folder, SETTINGS)("rows/a", lambda: {"loss": 3.0}) == {"loss": 3.0}
  assert "a.json: is damaged, moved to" in capsys.readouterr().err and (folder / "damaged/a.json-1").exists()


def test_one_command_measures_at_a_time(folder, monkeypatch):
  def meanwhile():
    with monkeypatch.context() as patch:
      patch.setattr(locks, "_held", {})  # what another process does not hold
      with pytest.raises(InputError, match=r"--output_dir=.*run: in use by process \d+ on "):
        Kept(folder, SETTINGS)("rows/b", never)
    return {"loss": 2.0}

  assert Kept(folder, SETTINGS)("rows/b", meanwhile) == {"loss": 2.0}


def test_between_two_numbers_it_measures_still(folder, monkeypatch):
  """It reads a model and text there, and a second command must not take over what the first one works on."""
  first = Kept(folder, SETTINGS)
  first("rows/a", never)
  with monkeypatch.context() as patch:
    patch.setattr(locks, "_held", {})  # what another process does not hold
    with pytest.raises(InputError, match=r"--output_dir=.*run: in use by process \d+ on "):
      Kept(folder, SETTINGS)("rows/b", never)
  del first
  assert not locks._held


def test_numbers_of_a_shorter_run_are_not_those_of_a_longer(tmp_path):
  config = tiny.change(tiny.CONFIG, num_steps=4, schedule="constant", warmup_steps=1)
  Kept(tmp_path, {}, config)("a", dict)
  Kept(tmp_path, {}, tiny.change(config, log_every=3))("a", never)
  with pytest.raises(InputError, match=r"\(num_steps was 4, now 6\)"):
    Kept(tmp_path, {}, tiny.change(config, num_steps=6))


def test_other_code_is_refused_or_said(tmp_path, monkeypatch, capsys):
  """That of a user's method is refused. That of moe_jax is said once."""

  def with_balancer(rate):
    def mine():
      return Balancer() if rate else None

    return tiny.change(tiny.CONFIG, balancers=mine)

  def numbers(name, config):
    return Kept(tmp_path, SETTINGS, config)(name, lambda: {"loss": 1.0})

  numbers("a", with_balancer(1.0))
  assert numbers("a", with_balancer(1.0)) == {"loss": 1.0}
  with pytest.raises(InputError, match=r"holds numbers of other settings .*own code"):
    numbers("b", with_balancer(2.0))
  monkeypatch.setattr("moe_jax.analysis.kept.of_package", lambda: "another")
  kept = Kept(tmp_path, SETTINGS, with_balancer(1.0))
  assert kept("a", never) == kept("a", never) == {"loss": 1.0}
  assert capsys.readouterr().err.count("a.json: was measured by other code of moe_jax (digest ") == 1
