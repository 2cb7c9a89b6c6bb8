"""The scripts that tune: a published folder with its chat template, and arms from a run, paired by seed."""

import json

import numpy as np
import pytest
import tokenizers
from flax import nnx

import moe_jax
from moe_jax import disk
from moe_jax.comparison.report import read_stored
from moe_jax.data.chat import read_chat_template
from moe_jax.data.prompts import Example, write_jsonl
from moe_jax.training.compiled import make_model, resolve_config
from moe_jax.training.digests import tree_digest
from moe_jax.training.made import source_of
from moe_jax.training.start import save_model
from tests import tiny
from tests.data.test_chat import CHATML
from tests.scripts import assert_one_line, run_scripts

CONFIG = tiny.change(
  tiny.CONFIG,
  dataset="text_folder",
  balancers="none",
  capacity_factor=1.25,
  jitter=0.0,
  dispatcher="dropless",
)
EXAMPLES = [Example(f"{a}+{b}=", str(a + b), "ab"[a % 2]) for a in range(8) for b in range(8)]
TRAIN = ["--num_steps=2", "--batch_size=4", "--eval_batches=2", "--tensorboard=false", "--data_parallelism=1"]
SWAP = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
for old, new in (("seed_0", "other"), ("seed_1", "seed_0"), ("other", "seed_1")):
  (folder / old).rename(folder / new)
"""


DAMAGE = """
import pathlib, sys
path = pathlib.Path(sys.argv[1])
path.write_text("mine" + path.read_text()[4:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Has published/, seed_0/ and seed_1/, and files of examples."""
  folder = tmp_path_factory.mktemp("models")
  make = lambda seed: make_model(resolve_config(CONFIG), 264, seed=seed)
  for seed in (0, 1):
    save_model(folder / f"seed_{seed}", make(seed), CONFIG)
  moe_jax.save(make(0), folder / "published")
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  of_bytes = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  of_bytes.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  of_bytes.decoder = tokenizers.decoders.ByteLevel()
  of_bytes.save(str(folder / "published" / "tokenizer.json"))
  (folder / "published" / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
  write_jsonl(folder / "train.jsonl", EXAMPLES[:48])
  write_jsonl(folder / "held_out.jsonl", EXAMPLES[48:])
  (folder / "broken.jsonl").write_text('{"prompt": "1", "response": "2"}\n{"prompt": "1"}\n')
  return folder


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
  config = resolve_config(tiny.change(CONFIG, objective="masked_lm"))
  return save_model(tmp_path_factory.mktemp("masked") / "m", make_model(config, 264), config)


@pytest.mark.slow
def test_a_published_model_is_tuned_with_its_template_and_arms_are_paired(folder, tmp_path):
  jsonl = [f"--train_jsonl={folder}/train.jsonl", f"--validation_jsonl={folder}/held_out.jsonl"]
  script = ["experiments/finetune.py", f"--model={folder}/published", *TRAIN, "--sequence_length=128"]
  tune = [
    *script,
    *jsonl,
    "--schedule=constant",
    "--warmup_steps=1",
    "--adapter_rank=2",
    "--pack_examples",
    f"--output_dir={tmp_path}/tuned",
  ]
  arms = ["experiments/finetune_arms.py", f"--model={folder}/seed_{{seed}}", *TRAIN, "--sequence_length=160"]
  arms += ["--arms=all,expert_dropout", "--seeds=2", f"--output_dir={tmp_path}/arms"]
  wrong, text = f"--output_dir={tmp_path}/none", tmp_path / "text"
  disk.write_text(text / "a" / "b.txt", "abc " * 2000)
  inside = ["--dataset=text_folder", f"--text_folder={text}", f"--output_dir={text}/out"]
  teacher = moe_jax.load(folder / "seed_0").model
  made = source_of(teacher, 0, student_experts=4, calibration=16)
  save_model(tmp_path / "distilled" / "start", teacher, CONFIG, source=made)
  published = moe_jax.load(folder / "published")
  save_model(tmp_path / "drawn" / "start", teacher, CONFIG, source=source_of(published.model, published.step))
  distil = ["experiments/distil.py", f"--model={folder}/seed_0", f"--output_dir={tmp_path}/distilled"]
  swap = tmp_path / "swap.py"  # other models in the same folders
  swap.write_text(SWAP)
  damage = tmp_path / "damage.py"
  damage.write_text(DAMAGE)
  tuned, longer, damaged, again, compared, *refused, swapped, other_base = run_scripts(
    tune,
    [*tune, "--num_steps=3"],
    [str(damage), f"{tmp_path}/tuned/run/metrics.jsonl"],
    [*tune, "--num_steps=3"],
    arms,
    [*tune, f"--model={folder}/seed_1"],
    [*script, f"--train_jsonl={folder}/broken.jsonl", jsonl[1], wrong],
    [*script, *jsonl, "--trained=expert", wrong],
    [*script, *jsonl, "--adapter_rank=99", wrong],
    [*arms[:2], "--arms=al", wrong],
    [*distil, "--student_experts=4", "--calibration=1"],
    [*script, f"--model={folder}/seed_0", *inside],
    [*arms, *inside],
    [*tune, "--seed=7", f"--output_dir={tmp_path}/drawn"],
    [str(swap), str(folder)],
    [*arms, "--seeds=1"],
  )
  done = (tuned, longer, damaged, again, compared, swapped)
  assert {run.status for run in done} == {0}, "".join(run.stderr for run in done)
  assert "metrics.jsonl: 1 lines are missing or cannot be read; the best step is" in again.stderr
  assert json.loads((tmp_path / "tuned" / "report.json").read_text())["best"]["lines_missing"] == 1
  start = tmp_path / "arms" / "start" / "expert_dropout" / "seed_0"
  assert_one_line(other_base, f"{start}: was made of another model (digest was")
  assert "model: is of another model (step was 2, now 3;" in longer.stderr
  run, model, shorter = (tmp_path / "tuned" / name for name in ("run", "model", "damaged/model-1"))
  assert json.loads((model / "made_of.json").read_text())["step"] == moe_jax.load(run).step == 3
  assert json.loads((shorter / "made_of.json").read_text())["step"] == 2
  messages = [
    f"{tmp_path}/tuned/start: was made of another model (digest was",
    "broken.jsonl:2: response is missing",
    "--trained=expert: matches no parameter; did you mean experts",
  ]
  messages += ["rank=99: at most", "unknown arm 'al': did you mean all"]
  messages += ["distilled/start: was made of another model (calibration was 16, now 1)"]
  messages += [f"{text}/out: is in the folder of the text, --text_folder={text}, so its files"] * 2
  messages += ["drawn/start: was made of another model (seed was 0, now 7); choose another folder"]
  for ended, message in zip(refused, messages, strict=True):
    assert_one_line(ended, message)

  report = json.loads((tmp_path / "tuned" / "report.json").read_text())
  assert report["after"]["by_task"].keys() == {"a", "b"} and report["trained"] == "adapters"
  before, after = (report[when]["nll"] for when in ("before", "after"))
  assert np.isfinite([before, after]).all() and before != after
  original, final = moe_jax.load(folder / "published").model, moe_jax.load(tmp_path / "tuned" / "model").model
  assert final.config.moe.experts == original.config.moe.experts  # adapters are merged
  for name in ("start", "run", "model"):  # a second round writes examples as the first
    assert read_chat_template(tmp_path / "tuned" / name).source == CHATML
    assert moe_jax.load(tmp_path / "tuned" / name).tokenizer.ids == published.tokenizer.ids

  results = {
    (arm, seed): disk.read_object(tmp_path / "arms" / "tuned" / "arms" / arm / f"seed_{seed}" / "result.json")
    for arm in ("all", "expert_dropout")
    for seed in (0, 1)
  }
  digests = {key: result["init_from"]["digest"] for key, result in results.items()}
  assert len(set(digests.values())) == 4
  start = moe_jax.load(tmp_path / "arms" / "start" / "expert_dropout" / "seed_1").model
  assert digests["expert_dropout", 1] == tree_digest(nnx.state(start, nnx.Param))
  # The folders are swapped.
  assert digests["all", 1] == tree_digest(nnx.state(moe_jax.load(folder / "seed_0").model, nnx.Param))
  assert all(result["objective"] == "response" for result in results.values())
  assert len({result["fingerprint"] for result in results.values()}) == 1
  differences = [d for d in read_stored(tmp_path / "arms" / "tuned").differences if d.key == "perplexity"]
  assert {d.arm for d in differences} == {"expert_dropout"}
  assert all(len(d.per_seed) == 2 and not d.broken for d in differences)


def test_text_beside_examples_and_ids_that_are_no_text_are_refused(folder, tmp_path):
  jsonl = [f"--train_jsonl={folder}/train.jsonl", f"--validation_jsonl={folder}/held_out.jsonl"]
  tune = ["experiments/finetune.py", f"--model={folder}/seed_0", *TRAIN, f"--output_dir={tmp_path}/none"]
  text, chains, alone = run_scripts(
    [*tune, *jsonl, "--dataset=text_folder", "--text_folder=docs"],
    [*tune, *jsonl, "--dataset=markov"],
    [*tune, "--dataset=markov"],
  )
  for ended in (text, chains):
    assert_one_line(ended, "--train_jsonl and --dataset: give one")
  assert_one_line(alone, "--dataset=markov: its token ids stand for no text")


def test_a_model_of_masked_tokens_is_not_tuned_on_responses(masked, folder, tmp_path):
  jsonl = [f"--train_jsonl={folder}/train.jsonl", f"--validation_jsonl={folder}/held_out.jsonl"]
  to = [*TRAIN, f"--output_dir={tmp_path}/none", "--sequence_length=160"]
  one, arms, instructed = run_scripts(
    ["experiments/finetune.py", f"--model={masked}", *to, *jsonl],
    ["experiments/finetune_arms.py", f"--model={masked}", *to, "--seeds=1", "--arms=all"],
    ["experiments/instruct.py", f"--dense={masked}", f"--sparse={masked}", *to, "--seeds=1"],
  )
  for ended, name in ((one, "model"), (arms, "model"), (instructed, "dense")):
    assert_one_line(
      ended, f"--{name}={masked}: sees later tokens (objective masked_lm), so it writes no responses; "
    )


@pytest.mark.slow
def test_on_text_a_model_is_trained_and_measured_by_one_loss(masked, folder, tmp_path):
  for domain in "ab":
    (tmp_path / "text" / domain).mkdir(parents=True)
    for i in range(30):
      (tmp_path / "text" / domain / f"{i}.txt").write_text(f"{domain} {i} of many words " * 4)
  config = tiny.change(CONFIG, objective=f"distil:teacher={folder}/seed_0:soft=0.5")
  student = save_model(tmp_path / "student", make_model(resolve_config(CONFIG), 264, seed=2), config)
  text = [*TRAIN, "--dataset=text_folder", f"--text_folder={tmp_path / 'text'}", "--sequence_length=16"]
  tune = lambda model, name: [
    "experiments/finetune.py",
    f"--model={model}",
    *text,
    f"--output_dir={tmp_path}/{name}",
  ]
  ends = run_scripts(tune(masked, "of_masked"), tune(student, "of_student"))
  objectives = []
  for ended, name in zip(ends, ("of_masked", "of_student"), strict=True):
    assert ended.status == 0, ended.stderr
    objectives.append(disk.read_object(tmp_path / name / "run" / "config.json")["train"]["objective"])
    report = disk.read_object(tmp_path / name / "report.json")
    assert abs(report["before"]["nll"] - report["after"]["nll"]) < 1  # one network, after two steps
  assert objectives == ["masked_lm", "next_token"]
  assert "soft=0.5, and is tuned with next_token, by which it is measured on text" in ends[1].stderr
  assert "is tuned with" not in ends[0].stderr
  loaded = moe_jax.load(tmp_path / "of_masked" / "model").model
  assert not loaded.config.causal and loaded.embedding_VD[...].shape[0] == 265
