"""Perplexity and bits per byte by domain, and the two scripts on the folder of a run."""

import dataclasses
import json
import math
import shutil
import types

import numpy as np
import pytest
import tokenizers
from flax import nnx

from moe_jax.adapt.table import text_of
from moe_jax.config import DataConfig
from moe_jax.data import load_dataset
from moe_jax.data.dataset import dataset_of_texts
from moe_jax.data.prompts import Example, prompt_dataset
from moe_jax.data.text_folder import read_text_folder
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.inference import flags as model_flags
from moe_jax.inference.evaluate import evaluate, predicts_responses
from moe_jax.inference.flags import mesh_config
from moe_jax.nn import Context, Transformer
from moe_jax.training.compiled import make_model, resolve_config
from moe_jax.training.load import load_run
from moe_jax.training.loop import Run
from moe_jax.training.start import save_model
from moe_jax.training.validate import validate
from tests import tiny
from tests.scripts import assert_one_line, run_scripts

# Two domains, with characters of several bytes; documents of validation are every so many of a folder.
TEXTS = {"ascii": "the cat sat on the mat. ", "other": "épée über naïve – "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("texts")
  for domain, text in TEXTS.items():
    (root / domain).mkdir()
    for i in range(12):
      (root / domain / f"{i}.txt").write_text(text[i:] * (3 + i % 3))
  return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """Trained for two steps, which is enough to be loaded."""
  config = tiny.change(
    tiny.CONFIG, dataset="text_folder", num_steps=2, eval_batches=3, num_layers=1, sequence_length=16
  )
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, text_folder=str(folder)))
  run = Run(config, load_dataset(config.data), tmp_path_factory.mktemp("run"))
  return run, run.train()


def test_scores_are_sums_over_the_tokens_of_a_domain(run):
  loaded, dataset = Run.load(run[0].folder), run[0].dataset
  scores = evaluate(loaded.model, dataset, batch_size=8)
  sums = {name: [0.0, 0, 0] for name in ("all", *TEXTS)}
  for batch in dataset.validation_batches(8):
    context = Context(batch["mask_BL"], domain_B=batch["domain_B"], num_domains=2)
    logits = np.asarray(loaded.model(batch["tokens_BL"], context)[0], np.float64)
    for b, t in zip(*np.nonzero(batch["mask_BL"]), strict=True):
      target = batch["targets_BL"][b, t]
      nll = np.log(np.exp(logits[b, t]).sum()) - logits[b, t, target]
      for name in ("all", dataset.info.domains[batch["domain_B"][b]]):
        sums[name] = [x + y for x, y in zip(sums[name], (nll, 1, 1))]
  assert scores.keys() == sums.keys() and all(total[1] > 100 for total in sums.values())
  for name, (nll, targets, num_bytes) in sums.items():
    assert (scores[name].num_targets, scores[name].num_bytes) == (targets, num_bytes)
    np.testing.assert_allclose(scores[name].nll, nll / targets, rtol=1e-5)
    np.testing.assert_allclose(scores[name].perplexity, math.exp(nll / targets), rtol=1e-5)
    np.testing.assert_allclose(scores[name].bits_per_byte, nll / targets / math.log(2), rtol=1e-5)


@pytest.fixture(scope="module")
def lossy(folder, tmp_path_factory):
  """A model and a data set whose tokenizer makes letters small and drops spaces."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="?"))
  tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = tokenizers.decoders.WordPiece()
  trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=40, special_tokens=["?"], show_progress=False)
  tokenizer.train_from_iterator(TEXTS.values(), trainer)
  path = tmp_path_factory.mktemp("lossy") / "tokenizer.json"
  tokenizer.save(str(path))
  config = tiny.change(tiny.CONFIG, num_layers=1)
  text = {"dataset": "text_folder", "text_folder": str(folder), "sequence_length": 16, "batch_size": 4}
  config = dataclasses.replace(config, data=DataConfig(**text, tokenizer=str(path)))
  dataset = load_dataset(config.data)
  config = resolve_config(config)
  return config, make_model(config, dataset.info.vocab_size), dataset


@pytest.mark.parametrize("limit", [0, 2])
def test_bytes_are_those_of_the_text_and_of_results_whatever_a_tokenizer_drops(lossy, folder, limit):
  config, model, dataset = lossy
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=limit))
  scores = evaluate(model, dataset, dataset.config.batch_size, limit)
  expected = validate(model, config, dataset)
  np.testing.assert_allclose(scores["all"].nll, expected["nll"], rtol=1e-5)
  np.testing.assert_allclose(scores["all"].bits_per_byte, expected["bits_per_byte"], rtol=1e-5)
  if not limit:
    validation = read_text_folder(str(folder))[0]["validation"]
    sizes = {name: sum(len(t.encode()) for t, d in validation if d == i) for i, name in enumerate(TEXTS)}
    found = {name: score.num_bytes for name, score in scores.items()}
    assert found == {"all": sum(sizes.values()), **sizes}


def test_a_tokenizer_that_does_not_give_back_its_text_gets_a_line(lossy, capsys):
  load_dataset(lossy[2].config)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("note: the tokenizer does not give back the text that it encodes")
  load_dataset(dataclasses.replace(lossy[2].config, tokenizer="bytes"))
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("objective", ["response", "next_token"])
def test_prompts_are_scored_as_the_objective_does(objective):
  examples = [Example(f"{i}+1=", str(i % 9), "ab"[i % 2]) for i in range(10)]
  config = tiny.change(tiny.CONFIG, num_layers=1, sequence_length=16, eval_batches=0, objective=objective)
  config = resolve_config(config)
  dataset = prompt_dataset(config.data, examples[4:], examples[:4], load_tokenizer("bytes"))
  model = make_model(config, dataset.info.vocab_size)
  scores = evaluate(model, dataset, 4, responses=predicts_responses(config))
  np.testing.assert_allclose(scores["all"].nll, validate(model, config, dataset)["nll"], rtol=1e-5)
  assert scores["all"].num_targets == (8 if objective == "response" else 4 * 6)
  assert {(s.num_bytes, s.bits_per_byte) for s in scores.values()} == {(0, None)}


def test_what_cannot_be_evaluated_gets_one_line(run):
  loaded, dataset = Run.load(run[0].folder), run[0].dataset
  with pytest.raises(InputError, match="the data set has 264 token ids and the model embeds 16"):
    evaluate(Transformer(loaded.config.model, 16, rngs=nnx.Rngs(0)), dataset)
  both_ways = dataclasses.replace(loaded.config.model, causal=False)
  with pytest.raises(InputError, match="so text has no likelihood"):
    evaluate(Transformer(both_ways, 264, rngs=nnx.Rngs(0)), dataset)
  with pytest.raises(InputError, match="did you mean"):
    mesh_config(["exprt=2"])
  with pytest.raises(InputError, match="--mesh=expert=two: expert needs a number of devices"):
    mesh_config(["expert=two"])


def test_a_model_of_markov_chains_reads_no_text(run, folder):
  loaded = Run.load(run[0].folder)
  data = dataclasses.replace(loaded.config.data, dataset="markov", markov_states=512)  # more ids than bytes
  chains = loaded._replace(config=dataclasses.replace(loaded.config, data=data))
  with pytest.raises(
    InputError, match="--dataset=text_folder: is text, and the model reads the token ids of mark"
  ):
    text_of(chains, str(folder))


def test_the_tokenizer_of_a_model_cuts_any_text(folder):
  tokenizer = load_dataset(DataConfig(dataset="text_folder", text_folder=str(folder))).tokenizer
  other = tokenizer._replace(encode=lambda text: np.zeros(len(text), np.int32), fingerprint="zeros")
  config = DataConfig(dataset="text_folder", text_folder=str(folder), tokenizer="bpe:264", sequence_length=16)
  dataset = load_dataset(config, other)
  assert dataset.tokenizer.fingerprint == "zeros"
  targets = next(iter(dataset.validation_batches(8)))["targets_BL"]
  assert set(np.unique(targets)) <= {0, tokenizer.pad_id}


def test_the_scripts(run, folder, tmp_path):
  """Both on a run: their output, the mesh, and wrong input in one line."""
  trained, result = run
  model, scores = f"--model={trained.folder}", tmp_path / "scores.json"
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("the cat\n\nthe mat\n")
  say = ["scripts/generate.py", model, "--max_new_tokens=4"]
  one, several, measured, *wrong = run_scripts(
    [*say, "--prompt=the cat", "--mesh=data=2,expert=2"],
    [*say, f"--prompts_file={prompts}", "--temperature=0.7", "--top_k=5"],
    ["scripts/evaluate.py", model, f"--json={scores}"],
    ["scripts/generate.py", "--prompt=a"],
    ["scripts/generate.py", f"--model={tmp_path}", "--prompt=a"],
    say,
    [*say, f"--prompts_file={tmp_path}"],
    [*say, "--prompt=a", "--stop_ids=x"],
    [*say, "--prompt=a", "--mesh=data=3,expert=5"],
    [*say, "--prompt=a", "--mesh=data=2,tensor=3"],
    [*say, f"--prompt={'a' * 13}"],
    ["scripts/evaluate.py", model, "--dataset=text_folder", "--text_folder=nowhere"],
    ["scripts/evaluate.py", model, "--dataset=markov"],
  )
  assert (one.status, several.status, measured.status) == (0, 0, 0), (one, several, measured)
  assert one.stdout.startswith("the cat") and one.stdout.endswith("\n")
  assert "4 tokens; first step" in one.stderr and "8 tokens; first step" in several.stderr
  assert "the cat" in several.stdout and "\nthe mat" in several.stdout
  found = json.loads(scores.read_text())
  np.testing.assert_allclose(found["all"]["nll"], result["validation"]["nll"], rtol=1e-5)
  np.testing.assert_allclose(found["all"]["bits_per_byte"], result["validation"]["bits_per_byte"], rtol=1e-5)
  assert [line.split()[0] for line in measured.stdout.splitlines()] == [
    "domain",
    "all",
    *trained.dataset.info.domains,
  ]
  messages = (
    "--model: give the folder of a run",
    "holds no model (config.json is missing)",
    "--prompt: give at least one, or --prompts_file",
    f"--prompts_file={tmp_path}: cannot be read",
    "--stop_ids=x: must be numbers",
    "error: --mesh=data=3,expert=5: the axes must multiply to the",
    "=3, which splits it",
    "prompt 0 has 14 tokens, and with 4 new ones does not fit into max_length=16 positions; use --max_new_tokens=2",
    "nowhere",
    "--dataset=markov: its token ids stand for no text, and the model reads text",
  )
  for ended, message in zip(wrong, messages, strict=True):
    assert_one_line(ended, message)


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    ({}, (8, 3)),  # of the run, as its result
    ({"dataset": "text_folder"}, (8, 3)),
    ({"batch_size": 5}, (5, 5)),  # as many windows
    ({"eval_batches": 0}, (8, 0)),
    ({"eval_batches": 2, "batch_size": 4}, (4, 2)),
    ({"text_folder": "other"}, (16, 0)),
    ({"sequence_length": 32}, (16, 0)),
  ],
)
def test_as_much_text_is_scored_as_in_the_result_of_a_run(run, monkeypatch, given, expected):
  names = ("dataset", "text_folder", "data_dir", "sequence_length", "batch_size", "eval_batches")
  values = {name: types.SimpleNamespace(value=given.get(name)) for name in names}
  monkeypatch.setattr(model_flags.flags, "FLAGS", values)
  loaded = Run.load(run[0].folder)
  assert model_flags.scored_batches(loaded) == expected
  if not given:  # a published model has no result
    assert model_flags.scored_batches(loaded._replace(step=0)) == (16, 0)


@pytest.fixture(scope="module")
def by_domain(run, tmp_path_factory):
  """Of a router that reads the domain, with another row for each."""
  trained = run[0]
  config = resolve_config(tiny.change(trained.config, router="task_level:tasks=2", balancers="none"))
  model = make_model(config, trained.dataset.info.vocab_size)
  folder = tmp_path_factory.mktemp("by_domain") / "run"
  return load_run(save_model(folder, model, config, domains=trained.dataset.info.domains))


def test_a_router_that_reads_the_domain_gets_that_of_training(by_domain, folder, tmp_path):
  """By name: with one domain of two, its number would be that of the other."""
  whole = evaluate(by_domain.model, text_of(by_domain))
  shutil.copytree(folder / "other", tmp_path / "part" / "other")
  plain = load_dataset(
    dataclasses.replace(by_domain.config.data, text_folder=str(tmp_path / "part")), by_domain.tokenizer
  )
  wrong = evaluate(by_domain.model, plain)["all"].nll
  part = evaluate(by_domain.model, text_of(by_domain, str(tmp_path / "part")))
  assert list(part) == ["all", "other"] and part["all"] == part["other"]
  assert (part["other"].num_targets, part["other"].num_bytes) == whole["other"][1:]
  np.testing.assert_allclose(part["other"].nll, whole["other"].nll, rtol=1e-5)
  assert abs(wrong - whole["other"].nll) > 1e-3


def test_domains_that_training_did_not_have_are_named(by_domain, run, folder, tmp_path):
  """If a router reads them, and it is known what they were."""
  for name in ("ascii", "new"):
    shutil.copytree(folder / "ascii", tmp_path / name)
  (tmp_path / "new" / "0.txt").write_text("nothing is the same here " * 9)
  for path in tmp_path.glob("new/*.txt"):
    path.write_text(path.read_text().upper())
  match = (
    r"domains new are not among .*, ascii, other: --router=task_level:2 of .*; name them as in training$"
  )
  with pytest.raises(InputError, match=match) as error:
    text_of(by_domain, str(tmp_path))
  assert "\n" not in str(error.value)
  text_of(Run.load(run[0].folder), str(tmp_path))  # its router reads none
  for before in ({"domains": ["all"]}, {}):  # nobody said them to `save_model`
    loaded = load_run(folder_with(by_domain.folder, tmp_path / f"before{len(before)}", before))
    assert loaded.domains == () and text_of(loaded, str(folder)).info.domains == tuple(sorted(TEXTS))


def folder_with(folder, copy, values):
  """A copy of the folder of a run whose config.json says other domains."""
  shutil.copytree(folder, copy)
  config = json.loads((copy / "config.json").read_text())
  del config["domains"]
  (copy / "config.json").write_text(json.dumps(config | values))
  return copy


def test_a_run_on_text_of_ones_own_says_so_and_is_not_measured_on_another(run, tmp_path):
  texts = {"train": [("abab" * 40, 0)] * 12, "validation": [("baba" * 40, 0)] * 4}
  config = run[0].config
  own = dataset_of_texts(config.data, "mine", texts, ("letters",), ("dataset", "mine"))
  result = Run(config, own, tmp_path).train()
  assert (result["dataset"], result["config"]["data"]["dataset"]) == ("mine", "mine")
  loaded = Run.load(tmp_path)
  with pytest.raises(InputError, match=rf"unknown dataset 'mine'.*{tmp_path.name} is a run on it: say which"):
    text_of(loaded)


def test_a_run_whose_text_has_changed_is_measured_with_one_line(run, folder, tmp_path, capsys):
  """As of a data set of one's own in a run of before, which said the name in the configuration."""
  loaded = Run.load(run[0].folder)
  assert text_of(loaded).info == run[0].dataset.info and capsys.readouterr().err == ""
  was = json.loads((run[0].folder / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(was | {"fingerprint": "f" * 64}))
  text_of(loaded._replace(folder=tmp_path))
  (line,) = capsys.readouterr().err.splitlines()
  now = run[0].dataset.info.fingerprint[:12]
  assert line.startswith(
    f"note: {tmp_path}: was on other text than text_folder, which is read now (fingerprint ffffffffffff, now {now})"
  )
  text_of(loaded._replace(folder=tmp_path), str(folder))  # asked for
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
  text_of(loaded._replace(folder=tmp_path))
  assert capsys.readouterr().err == ""
