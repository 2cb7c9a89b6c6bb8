"""A run that starts from a saved model, and the choice of what it trains."""

import contextlib
import dataclasses
import errno
import os
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax import disk
from moe_jax.adapt import upcycle
from moe_jax.adapt.experts import merged
from moe_jax.adapt.layers import put_together, take_apart
from moe_jax.config import MeshConfig
from moe_jax.data import load_dataset
from moe_jax.data.bpe import load_bpe, train_bpe
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.sharding import make_mesh
from moe_jax.training.compiled import abstract_model, compile_steps, resolve_config
from moe_jax.training.digests import tree_digest
from moe_jax.training.load import load_run
from moe_jax.training.loop import Run
from moe_jax.training.made import is_current, is_made, source_of
from moe_jax.training.orbax_writer import OrbaxWriter
from moe_jax.training.selection import dotted, select_trained
from moe_jax.training.start import save_model, start_from
from tests import tiny
from tests.adapt import models

BIASED = dataclasses.replace(models.SPARSE, balancers="loss_free_bias:0.01")
CONFIG = dataclasses.replace(
  tiny.change(tiny.CONFIG, num_steps=2, eval_batches=1, hooks="average_parameters"),
  model=dataclasses.replace(models.CONFIG, moe=BIASED),
)


@pytest.fixture(scope="module")
def upcycled():
  return upcycle(models.model(models.DENSE), BIASED)


@pytest.fixture(scope="module")
def folder(upcycled, tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("models") / "seed_0", upcycled, CONFIG)


def test_a_saved_model_loads_bit_equal_and_without_an_optimizer(upcycled, folder):
  loaded = load_run(folder)
  assert models.hashes(loaded.model) == models.hashes(upcycled)
  assert loaded.config.model == upcycled.config and loaded.step == 0
  assert loaded.config.optimizer.trained == "none"
  params = nnx.state(loaded.model, nnx.Param)
  assert not any(
    v.get_metadata().get("group") for _, v in nnx.to_flat_state(params)
  )  # a loop of your own trains it
  stored = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
  assert stored < 1.5 * sum(x.nbytes for x in jax.tree.leaves(params)) + 100_000
  with pytest.raises(InputError, match="has a run or a model already"):
    save_model(folder, upcycled, CONFIG)


@pytest.mark.parametrize("when", ["parameters", "configuration"])
def test_a_kill_while_it_is_written_leaves_no_model(upcycled, tmp_path, monkeypatch, when):
  def killed(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(*((OrbaxWriter, "write") if when == "parameters" else (disk, "write_json")), killed)
    save_model(tmp_path / "model", upcycled, CONFIG)
  assert not is_made(tmp_path / "model", {"step": 1})
  save_model(tmp_path / "model", upcycled, CONFIG, source={"step": 1})
  assert is_made(tmp_path / "model", {"step": 1})
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_line_and_leaves_room(upcycled, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with (
    monkeypatch.context() as patch,
    pytest.raises(InputError, match="model: no space left to write") as error,
  ):
    patch.setattr(OrbaxWriter, "write", full)
    save_model(tmp_path / "model", upcycled, CONFIG)
  assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "", '{"mod'])
def test_a_model_whose_configuration_is_damaged_is_written_again(folder, upcycled, tmp_path, capsys, content):
  model = shutil.copytree(folder, tmp_path / "model")
  (model / "config.json").unlink()
  if content is not None:
    (model / "config.json").write_text(content)
  assert not is_made(model, {})
  save_model(model, upcycled, CONFIG, source={})
  assert is_made(model, {}) and models.hashes(load_run(model).model) == models.hashes(upcycled)
  assert (tmp_path / "damaged" / "model-1" / "checkpoints" / "0").is_dir()
  assert capsys.readouterr().err.count("its config.json is missing or not whole, moved to") == 1


def test_what_others_did_not_start_from_is_refused_before_a_step(folder, tmp_path):
  """A model may be trained further, or replaced, between two arms of one table."""
  config = tiny.change(CONFIG, init_from=str(folder), num_steps=1)
  dataset, digest = load_dataset(config.data), tree_digest(nnx.state(load_run(folder).model, nnx.Param))
  message = rf"one: --init_from={re.escape(str(folder))} has other parameters \(digest {digest}\) than when other runs started"
  with pytest.raises(InputError, match=message):
    Run(config, dataset, tmp_path / "one", starts={str(folder): "another"}).train()
  assert not (tmp_path / "one" / "metrics.jsonl").exists() and not (tmp_path / "one" / "config.json").exists()
  others = {str(folder): digest, "elsewhere": "another"}
  assert (
    Run(config, dataset, tmp_path / "one", starts=others).train()["init_from"]["digest"]
    == others[str(folder)]
  )


def test_what_is_in_the_way_is_never_moved(upcycled, tmp_path):
  for name in ("notes.txt", "checkpoints"):  # of a user; of a run, whose configuration is lost
    folder = tmp_path / name
    (folder / name / "3").mkdir(parents=True)
    with pytest.raises(InputError, match="has a run or a model already"):
      save_model(folder, upcycled, CONFIG)
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_model_says_what_it_was_made_of(folder, upcycled, tmp_path):
  source = source_of(upcycled, 600, share=0.5)
  assert source["digest"] == tree_digest(nnx.state(upcycled, nnx.Param))
  made = save_model(tmp_path / "model", upcycled, CONFIG, source=source)
  assert is_made(made, source) and is_made(made, {"step": 600})
  for other, match in (
    ({"step": 1200}, r"was made of another model \(step was 600, now 1200\); choose another folder"),
    (source_of(models.model(), 600), r"\(digest was '\w+', now '\w+'\)"),
    (source | {"share": 0.25}, r"\(share was 0.5, now 0.25\)"),
    (source | {"seed": 7}, r"\(seed was 0, now 7\)"),  # of its configuration
  ):
    with pytest.raises(InputError, match=match):
      is_made(made, other)
  with pytest.raises(InputError, match="does not say which model it was made of"):
    is_made(folder, source)
  assert is_current(made, source) and made.exists()
  assert not is_current(made, {"step": 1200}) and not made.exists()  # it is moved aside
  assert is_made(tmp_path / "damaged" / "model-1", source)


@pytest.mark.parametrize("when", ["before it begins", "before it is whole"])
def test_two_commands_that_make_the_same_model_at_the_same_time_both_have_it(
  upcycled, tmp_path, monkeypatch, when
):
  """The run that they then train is locked, and one line says by whom."""
  folder, source, write = tmp_path / "start", source_of(upcycled, 600), OrbaxWriter.write
  quicker = lambda made_of: save_model(folder, upcycled, CONFIG, source=made_of)

  def is_second(*args):
    with monkeypatch.context() as patch:
      patch.setattr(OrbaxWriter, "write", write)
      quicker(found)
    return write(*args)

  for found in (source, {"step": 1200}, None):
    with contextlib.ExitStack() as stack:
      if when == "before it begins":
        quicker(found)
      else:
        stack.enter_context(monkeypatch.context()).setattr(OrbaxWriter, "write", is_second)
      if found is not source:
        match = "was made of another model" if found else "does not say which model it was made of"
        stack.enter_context(pytest.raises(InputError, match=match))
      assert save_model(folder, upcycled, CONFIG, source=source) == folder
    assert models.hashes(load_run(folder).model) == models.hashes(upcycled)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
    shutil.rmtree(folder)


def test_a_run_trains_from_it_what_is_chosen_and_nothing_else(folder, upcycled, tmp_path):
  config = tiny.change(CONFIG, init_from=str(folder.parent / "seed_{seed}"), trained="experts")
  result = Run(config, load_dataset(config.data), tmp_path).train()
  start = result["init_from"]
  assert start == {"folder": str(folder), "digest": tree_digest(nnx.state(upcycled, nnx.Param))}
  again = Run(config, load_dataset(config.data), tmp_path).train()  # from its last checkpoint
  assert again["init_from"] == start
  before, after = models.hashes(upcycled), models.hashes(load_run(tmp_path).model)
  changed = {path for path in before if before[path] != after[path]}
  experts = {path for path in before if ".experts." in path}
  assert experts and changed - {path for path in before if path.endswith("balancer_state")} == experts
  state = compile_steps(config, tiny.VOCAB, 2, make_mesh(config.mesh)).abstract_state
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  of_experts = sum(v.size for path, v in nnx.to_flat_state(state.params) if "experts" in path)
  assert 2 * of_experts <= moments < 2 * of_experts + 10  # Adam's two, and counts


@pytest.mark.parametrize("mesh", [tiny.ONE_DEVICE, MeshConfig(data=2, expert=2, fsdp=2)], ids=["1", "8"])
def test_the_state_it_starts_from_is_the_saved_one_on_any_mesh(folder, upcycled, mesh):
  config = resolve_config(tiny.change(CONFIG, init_from=str(folder), mesh=mesh))
  mesh = make_mesh(mesh)
  with jax.set_mesh(mesh):
    state = start_from(compile_steps(config, tiny.VOCAB, 2, mesh), config, mesh)
  started = nnx.merge(nnx.graphdef(abstract_model(config, tiny.VOCAB)), state.params, state.variables)
  assert models.hashes(started) == models.hashes(upcycled)
  jax.tree.map(np.testing.assert_array_equal, state.hooks[0], state.params)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"model_dim": 32}, r"holds another model \(\d+ variables differ, such as .*: there float32"),
    (
      {"balancers": "none"},
      "its balancers loss_free_bias:0.01 have states .* those of this run, none, have no place",
    ),
    ({"init_from": "nowhere"}, "--init_from=nowhere: nowhere: holds no run"),
  ],
)
def test_what_cannot_be_started_from_is_said_in_one_line(folder, fields, match):
  config = resolve_config(tiny.change(CONFIG, **{"init_from": str(folder)} | fields))
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh), pytest.raises(InputError, match=match) as error:
    start_from(compile_steps(config, tiny.VOCAB, 2, mesh), config, mesh)
  assert "\n" not in str(error.value) and str(error.value).startswith("--init_from=")


def test_a_model_of_another_tokenizer_is_refused(upcycled, tmp_path):
  own, other = (load_bpe(train_bpe([text * 9], 262)) for text in ("abc ", "xyz "))
  assert own.vocab_size == other.vocab_size
  folder = save_model(tmp_path / "model", upcycled, CONFIG, own)
  config = resolve_config(tiny.change(CONFIG, init_from=str(folder)))
  dataset = load_dataset(config.data)
  dataset.tokenizer = other
  own_file = re.escape(f"{folder}/tokenizer.json")
  with pytest.raises(
    InputError, match=f"^--init_from=.*another tokenizer .*; choose --tokenizer={own_file}$"
  ):
    Run(config, dataset, tmp_path / "run").train()
  mesh = make_mesh(config.mesh)
  same = load_tokenizer(f"{folder}/tokenizer.json")  # as that flag loads it
  with jax.set_mesh(mesh):
    state = start_from(compile_steps(config, tiny.VOCAB, 2, mesh), config, mesh, same)
  assert tree_digest(state.params) == tree_digest(nnx.state(upcycled, nnx.Param))


def test_a_balancer_that_the_saved_model_does_not_have_begins_anew(upcycled, tmp_path):
  plain = upcycle(models.model(models.DENSE), models.SPARSE)
  folder = save_model(tmp_path / "plain", plain, CONFIG)
  config = resolve_config(tiny.change(CONFIG, init_from=str(folder)))
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = start_from(compile_steps(config, tiny.VOCAB, 2, mesh), config, mesh)
  assert all(not np.any(x) for x in jax.tree.leaves(state.variables))


def trained_by(selection):
  model = select_trained(abstract_model(resolve_config(CONFIG), tiny.VOCAB), selection)
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {dotted(path) for path, v in flat if v.get_metadata().get("group") != "frozen"}


def test_names_and_patterns_choose_parameters():
  every = trained_by("all")
  block = "segments.0.pattern.blocks.0."
  experts = {f"{block}ffn.experts.{name}" for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")}
  router = {f"{block}ffn.router.w_router_DE"}
  assert trained_by("none") == set()
  assert trained_by("experts") == experts and trained_by("router") == router
  assert trained_by("ffn") == experts | router
  assert trained_by("all_but_experts") == every - experts
  attention = trained_by("attention")
  assert attention and all(path.startswith(f"{block}mixer.") for path in attention)
  assert trained_by("router,w_*_EDF") == router | {path for path in experts if "EDF" in path}
  assert trained_by("all_but_*.experts.*") == every - experts
  assert trained_by("embedding") == {"embedding_VD", "w_head_DV"}


def test_what_is_frozen_by_its_network_stays_frozen():
  config = tiny.change(CONFIG, experts="low_rank:rank=2")
  model = select_trained(abstract_model(resolve_config(config), tiny.VOCAB), "experts")
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  free = {path[-2] for path, v in flat if v.get_metadata().get("group") != "frozen"}
  assert free == {"down", "up"}


@pytest.mark.parametrize(
  ("selection", "match"),
  [
    ("expert", "--trained=expert: matches no parameter; did you mean experts"),
    ("router,w_upp_EDF", "--trained=w_upp_EDF: matches no parameter; did you mean w_up_EDF"),
    ("all_but_*.zzz*", r"--trained=all_but_\*.zzz\*: matches no parameter; names are all, none"),
  ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(selection, match):
  with pytest.raises(InputError, match=match):
    trained_by(selection)


def test_a_merged_model_keeps_the_table_of_its_router(tmp_path):
  model = models.model()
  table = np.arange(8) % 4
  parts = take_apart(model)
  small = [
    merged(layer, table, np.ones(8), np.ones(8), align=False, keep_router=True) for layer in parts.layers
  ]
  small = put_together(parts._replace(layers=tuple(small)))
  folder = save_model(tmp_path / "merged", small, CONFIG)
  assert models.hashes(load_run(folder).model) == models.hashes(small)
  config = dataclasses.replace(CONFIG, model=small.config)
  config = resolve_config(tiny.change(config, init_from=str(folder), balancers="switch_loss:0.01"))
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = compile_steps(config, tiny.VOCAB, 2, mesh)
    state = start_from(steps, config, mesh)
  started = nnx.merge(nnx.graphdef(abstract_model(config, tiny.VOCAB)), state.params, state.variables)
  changed = models.hashes(started).items() ^ models.hashes(small).items()
  assert {path.partition(".")[2] for path, _ in changed} <= {"ffn.balancer_state"}


def test_several_processes_do_not_write_a_model(tmp_path, monkeypatch):
  monkeypatch.setattr("moe_jax.training.start.jax.process_count", lambda: 2)
  with pytest.raises(InputError, match="a model is written by one process, not by 2; start one"):
    save_model(tmp_path / "model", None, None)
  assert not (tmp_path / "model").exists()
