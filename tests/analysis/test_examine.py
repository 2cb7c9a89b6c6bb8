"""An examination counts what the routers chose: against loops over tokens, on a model with two kinds of layers."""

import csv
import dataclasses
import html.parser
import os

import jax
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import Context, disk, locks
from moe_jax.analysis.examine import replays, report, tables
from moe_jax.analysis.examine.examination import Examination, examine
from moe_jax.analysis.examine.sums import NUM_BINS, Tokens, reached_devices, sums_of_layer
from moe_jax.config import BlockConfig, ModelConfig, Segment
from moe_jax.data.bpe import train_bpe
from moe_jax.errors import InputError
from moe_jax.nn.aux import moe_auxes
from moe_jax.nn.build import resolve
from moe_jax.nn.transformer import Transformer
from moe_jax.training import compiled
from moe_jax.training.router_trace import Trace
from tests import tiny
from tests.interop.helpers import MIXTRAL, random_model
from tests.scripts import assert_one_line, run_scripts

MOE = tiny.change(tiny.CONFIG, balancers="none", jitter=0.0).model.moe
SMALL = dataclasses.replace(MOE, num_experts=4, num_experts_per_token=1)
DEVICES = 2
SCRIPT = "experiments/examine.py"
TEXTS = ["code", "prose"]


def make_model(*patterns, **fields):
  segments = tuple(
    Segment(tuple(BlockConfig(moe=moe) for moe in moes), repeats) for moes, repeats in patterns
  )
  dense = Segment((BlockConfig(ffn="mlp", moe=MOE),))
  config = ModelConfig(
    model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, dense_dim=16, segments=(dense, *segments), **fields
  )
  return Transformer(config, tiny.VOCAB, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def examined():
  """(model, batches, what was seen, examination): layers with 8, 4, 8, 4 experts behind a dense one."""
  model, seen = make_model(((MOE, SMALL), 2)), [{}, {}]
  batches = [tiny.make_batch(seed=seed) for seed in (1, 2)]
  found = examine(
    model, batches, TEXTS, DEVICES, lambda batch, layer, x: seen[batch].update({layer: np.asarray(x)})
  )
  return model, batches, seen, found


def choices_of(model, batch):
  """[(token, expert) pairs by layer] that the model itself says, each token as (sequence, position)."""
  _, aux = model(batch["tokens_BL"], Context(batch["mask_BL"], record_logits=True))
  big, small = moe_auxes(aux)
  found = []
  for repetition in range(2):
    for layer in (big, small):
      chosen = np.argwhere(np.asarray(layer.selected_BLE[repetition]) > 0)
      found.append([((b, t), e) for b, t, e in chosen.tolist() if batch["mask_BL"][b, t]])
  return found


def test_every_sum_is_that_of_a_loop(examined):
  model, batches, _, found = examined
  right = [{name: np.zeros_like(x) for name, x in sums._asdict().items()} for sums in found.layers]
  sequences: list[list] = [[], [], [], []]
  place = {int(v): i for i, v in enumerate(found.named_ids)}
  for batch in batches:
    layers = choices_of(model, batch)
    for r, pairs in enumerate(layers):
      of_token: dict = {}
      own, num_experts = right[r], (8, 4)[r % 2]
      per_sequence = np.zeros((8, num_experts))
      for (b, t), e in pairs:
        of_token.setdefault((b, t), []).append(e)
        own["by_domain_SE"][batch["domain_B"][b], e] += 1
        own["by_position_XE"][t * NUM_BINS // 16, e] += 1
        own["by_token_XE"][place[int(batch["tokens_BL"][b, t])], e] += 1
        per_sequence[b, e] += 1
      for where, experts in of_token.items():
        assert len(experts) == (2, 1)[r % 2]
        own["reached_X"][len({e // (num_experts // DEVICES) for e in experts})] += 1
        earlier = [e for w, e in layers[r - 1] if w == where] if r else []
        for e in experts:
          for other in experts:
            own["together_XE"][e, other] += 1
          for other in earlier:
            own["before_XE"][other, e] += 1
      sequences[r].append(per_sequence)
  assert found.num_tokens == sum(batch["mask_BL"].sum() for batch in batches)
  for r, sums in enumerate(found.layers):
    right[r]["per_sequence_BE"] = np.concatenate(sequences[r])
    for name in set(sums._fields) - {"entropy"}:
      np.testing.assert_array_equal(getattr(sums, name), right[r][name], err_msg=f"{name} of layer {r}")
  counts = np.bincount(np.concatenate([b["tokens_BL"][b["mask_BL"]] for b in batches]), minlength=tiny.VOCAB)
  np.testing.assert_array_equal(found.named_counts, counts[found.named_ids])
  assert (np.diff(found.named_counts) <= 0).all()


def test_rows_say_what_the_sums_say(examined):
  _, batches, seen, found = examined
  rows = found.rows()
  assert [row["num_experts"] for row in rows] == [8, 4, 8, 4]
  assert [row["experts_per_token"] for row in rows] == [2, 1, 2, 1]
  for r, row in enumerate(rows):
    num_experts = row["num_experts"]
    load = found.load_E(r)
    assert row["max_vio"] == pytest.approx(load.max() / load.mean() - 1, rel=1e-5)
    assert row["dead_experts"] == (load < 0.01 * load.mean()).sum()
    assert row["super_experts"] == (load > 2 * load.mean()).sum()
    joint = found.layers[r].by_domain_SE / load.sum()
    chance = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    right = sum(p * np.log(p / q) for p, q in zip(joint.ravel(), chance.ravel(), strict=True) if p > 0)
    assert row["information_domain"] == pytest.approx(right, abs=1e-5)
    for factor in (0.5, 1.0, 2.0):
      capacity = int(np.ceil(16 * row["experts_per_token"] * factor / num_experts))
      over = sum(max(0, n - capacity) for n in found.layers[r].per_sequence_BE.ravel())
      assert row[f"dropped_at_{factor:g}"] == pytest.approx(over / load.sum())
    # the softmax of the logits, over tokens that are no padding
    entropies = []
    for batch, logits in zip(batches, seen, strict=True):
      e = np.exp(logits[r] - logits[r].max(axis=-1, keepdims=True))
      p = e / e.sum(axis=-1, keepdims=True)
      entropies.append(-(p * np.log(p)).sum(axis=-1)[batch["mask_BL"]])
    assert row["router_entropy"] == pytest.approx(np.concatenate(entropies).mean(), rel=1e-4)
  assert found.expected_devices(0) == pytest.approx(2 * (1 - (4 * 3) / (8 * 7)))


def test_where_the_devices_do_not_divide_the_experts_nobody_knows_how_many_are_reached(examined, tmp_path):
  *_, found = examined
  counted = [
    sums._replace(
      reached_X=np.asarray(reached_devices(np.ones((1, 2, len(sums.together_XE))), np.ones((1, 2)), 3))
    )
    for sums in found.layers
  ]
  found = dataclasses.replace(found, layers=tuple(counted), num_devices=3)
  report.write(tmp_path, found, title="", command="", facts={}, text_of=str)
  for line in csv.DictReader((tmp_path / "layers.csv").open()):
    assert line["devices_per_token"] == line["devices_by_chance"] == "" != line["max_vio"]
  column = [key for key, *_ in tables.COLUMNS].index("devices_per_token")
  assert {tables.cells(row)[column] for row in found.rows()} == {"-"}


def test_padding_and_the_cut_into_batches_change_nothing(examined):
  model, batches, _, found = examined
  padded = {name: np.array(x) for name, x in batches[0].items()}
  padded["tokens_BL"][~padded["mask_BL"]] = 7
  halves = [{name: x[rows] for name, x in batches[1].items()} for rows in (slice(0, 4), slice(4, 8))]
  first = examine(model, [padded], TEXTS, DEVICES)
  second = examine(model, halves, TEXTS, DEVICES)
  for one, two, whole in zip(first.layers, second.layers, found.layers, strict=True):
    for name in ("by_domain_SE", "together_XE", "before_XE", "reached_X"):
      np.testing.assert_array_equal(getattr(one, name) + getattr(two, name), getattr(whole, name))


def test_two_choices_of_one_merged_expert_are_one_of_its_tokens(examined):
  model, batches, *_ = examined
  batch = batches[0]
  _, aux = model(batch["tokens_BL"], Context(batch["mask_BL"], record_logits=True))
  layer = jax.tree.map(lambda x: x[0], moe_auxes(aux)[0])
  selected_BLE = np.zeros(layer.selected_BLE.shape, np.int8)
  selected_BLE[:, :, 1], selected_BLE[:, ::2, 3] = 2, 1
  tokens = Tokens(batch["mask_BL"], np.ones((8, 1)), np.zeros(batch["tokens_BL"].shape, np.int32))
  sums = sums_of_layer(layer._replace(selected_BLE=selected_BLE), selected_BLE, tokens, 1, 1)
  pairs = {(1, 1): 8 * 16, (1, 3): 8 * 8, (3, 1): 8 * 8, (3, 3): 8 * 8}
  for found_XE in (sums.together_XE, sums.before_XE):
    assert {(int(x), int(e)): int(found_XE[x, e]) for x, e in np.argwhere(found_XE)} == pairs
  assert sums.by_domain_SE[0, 1] == 2 * 8 * 16 and sums.by_token_XE[0, 1] == 8 * 16
  sums = jax.tree.map(np.asarray, sums)
  found = Examination((sums,), 1, np.full(8, 16), np.arange(1), np.array([8 * 16]), ("all",))
  rows = {row["expert"]: row for row in tables.expert_rows(found, str) if row["load"]}
  assert {e: (row["tokens"], row["partner_share"]) for e, row in rows.items()} == {
    1: ("0:100%", 0.5),
    3: ("0:50%", 1.0),
  }


def test_shares_of_a_merged_model_are_shares_of_tokens(examined):
  """Its router has eight logits for three experts, so that two choices of a token are often of one."""
  _, batches, *_ = examined
  moe = dataclasses.replace(MOE, num_experts=3, router="merged_topk:logits=8", balancers="none")
  config = dataclasses.replace(tiny.CONFIG.model, moe=moe)
  found = examine(Transformer(config, tiny.VOCAB, rngs=nnx.Rngs(1)), batches, TEXTS, 1)
  for layer in found.layers:
    sent_E = np.diagonal(layer.together_XE)
    assert (sent_E < layer.by_domain_SE.sum(axis=0)).any()
    np.testing.assert_array_equal(layer.by_token_XE.sum(axis=0), sent_E)
  rows = tables.expert_rows(found, str)
  shares = [int(part.split(":")[1][:-1]) for row in rows for part in row["tokens"].split()]
  assert 0 < max(shares) <= 100 and 0 < max(row["partner_share"] for row in rows) <= 1


class Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.names, self.text = set(), []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.names.add(tag)

  def handle_data(self, data):
    self.text.append(data)


def test_the_page_has_every_table_and_escapes_every_name(examined, tmp_path):
  *_, found = examined
  evil = "<script>alert(1)</script>"
  found = dataclasses.replace(found, domains=(evil, "prose"))
  replayed = [{"method": evil, "max_vio": 1.0, "max_vio_std": 0.5, "max_vio_summed": 0.25}]
  given = {
    "facts": {evil: evil},
    "text_of": lambda token: f"<b>{token}\n",
    "replays": replayed,
    "notes": [evil],
  }
  path = report.write(tmp_path, found, title=evil, command=evil, **given)
  page = Page(path.read_text())
  assert not {"script", "b", "link", "iframe"} & page.names and "".join(page.text).count(evil) >= 6
  text = path.read_text()
  assert "http" not in text and "{{" not in text and text.count("<img") == 5
  lines = list(csv.DictReader((tmp_path / "layers.csv").open()))
  assert [float(line["max_vio"]) for line in lines] == [row["max_vio"] for row in found.rows()]
  experts = list(csv.DictReader((tmp_path / "experts.csv").open()))
  assert [line["layer"] for line in experts] == ["0"] * 8 + ["1"] * 4 + ["2"] * 8 + ["3"] * 4
  assert sum(float(line["load"]) for line in experts[:8]) == pytest.approx(8, abs=1e-2)
  saved = np.load(tmp_path / "examination.npz")
  np.testing.assert_array_equal(saved["layer_1.by_domain_SE"], found.layers[1].by_domain_SE)


def test_tokens_of_an_expert_are_those_it_takes_most_of(examined):
  *_, found = examined
  rows = tables.expert_rows(found, str)
  for row in rows:
    for part in row["tokens"].split():
      token, _, share = part.partition(":")
      place = list(found.named_ids).index(int(token))
      taken = found.layers[row["layer"]].by_token_XE[place, row["expert"]]
      assert found.named_counts[place] >= tables.LEAST
      assert share == f"{taken / found.named_counts[place]:.0%}"
  assert any(row["tokens"] for row in rows)
  assert tables.shown(" a\n") == "␣a⏎" and tables.shown("") == "(none)" and tables.shown("\x00") == "\\x00"


def test_recorded_logits_replay_to_the_same_choices(examined, tmp_path):
  """Without a bias, the replayed router sends as many tokens to each expert as the model did."""
  config = dataclasses.replace(tiny.CONFIG.model, moe=dataclasses.replace(MOE, dispatcher="dropless"))
  model = Transformer(config, tiny.VOCAB, rngs=nnx.Rngs(1))
  whole = tiny.change(tiny.CONFIG, balancers="none", jitter=0.0, dispatcher="dropless")
  whole = dataclasses.replace(whole, model=resolve(whole.model))
  batches = [tiny.make_batch(seed=seed) for seed in range(4)]
  assert replays.can_record(whole)
  with replays.recording(tmp_path / "logits", whole, batches) as see:
    found = examine(model, batches, TEXTS, DEVICES, see)
  none, bias = replays.replay_all(tmp_path / "logits", ["none", "loss_free_bias:0.05"], 8)
  last = examine(model, batches[-1:], TEXTS, DEVICES)
  assert none["updates"] == 1  # a quarter of four
  assert none["max_vio"] == pytest.approx(np.mean([row["max_vio"] for row in last.rows()]), abs=2e-2)
  assert bias["max_vio"] < none["max_vio"]
  assert found.num_tokens == 4 * last.num_tokens


def test_a_stream_of_layers_is_examined_as_the_whole_model(tmp_path):
  config = compiled.resolve_config(moe_jax.preset("deepseek_v3_tiny"))
  moe_jax.save(compiled.make_model(config, tiny.VOCAB, seed=0), tmp_path / "model")
  batches = [tiny.make_batch(seed=seed) for seed in (1, 2)]
  loaded = moe_jax.load(tmp_path / "model")
  found, replayed, logits = [], [], []
  for i, model in enumerate((loaded.model, moe_jax.LayerStream(tmp_path / "model"))):
    with replays.recording(tmp_path / str(i), loaded.config, batches) as see:
      found.append(examine(model, batches, TEXTS, DEVICES, see))
    replayed += replays.replay_all(tmp_path / str(i), ["loss_free_bias:0.05"], 16)
    logits.append(Trace(tmp_path / str(i)).read(0, 2))
  one, other = ({name: x for name, x in row.items() if name != "method"} for row in replayed)
  assert one == pytest.approx(other, rel=1e-5) and one["max_vio"] > 0
  np.testing.assert_allclose(logits[0].logits_IRBLE, logits[1].logits_IRBLE, rtol=2e-3, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, *(x._replace(logits_IRBLE=0) for x in logits))
  whole, stream = found
  assert len(whole.layers) == config.model.num_layers - config.model.num_dense_first > 1
  for one, other in zip(whole.layers, stream.layers, strict=True):
    for name in set(one._fields) - {"entropy"}:
      np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert one.entropy == pytest.approx(other.entropy, rel=1e-5)


def test_what_cannot_be_examined():
  dense = make_model()
  with pytest.raises(InputError, match="examine: the model has no layer with routed experts"):
    examine(dense, [tiny.make_batch()], TEXTS, DEVICES)
  with pytest.raises(InputError, match="examine: the data set has no text"):
    examine(make_model(((SMALL,), 1)), [], TEXTS, DEVICES)


def test_a_folder_of_a_stopped_examination_is_used_again(tmp_path):
  """With recorded router logits and tables, before the numbers. Logits of a training run are something else."""
  path = tmp_path / "router_logits/header.json"
  report.check_folder(tmp_path)
  disk.write_json(path, {"router": "softmax_topk"})
  for name in (locks.LOCK, "layers.csv", f"{disk.WRITING}abc", f"router_logits/{disk.WRITING}abc"):
    (tmp_path / name).touch()
  report.check_folder(tmp_path)
  disk.write_json(path, {"router": "softmax_topk", "fingerprint": "abc"})
  with pytest.raises(InputError, match="holds something else; choose another folder"):
    report.check_folder(tmp_path)
  disk.write_json(path, {})
  (tmp_path / "thesis.tex").touch()
  with pytest.raises(InputError, match="holds something else; choose another folder"):
    report.check_folder(tmp_path)
  (tmp_path / "examination.npz").touch()
  report.check_folder(tmp_path)
  with pytest.raises(InputError, match=r"thesis\.tex is a file; choose a folder"):
    report.check_folder(tmp_path / "thesis.tex")


def test_the_script(tmp_path):
  """A checkpoint as a whole and layer by layer, and a folder that holds something else."""
  model, texts = tmp_path / "model", tmp_path / "texts"
  moe_jax.save(random_model(MIXTRAL, 260), model)
  (model / "tokenizer.json").write_bytes(train_bpe(["abc abc"], 260))
  (model / "tokenizer_config.json").write_text('{"bos_token": "!"}')
  for domain in ("one", "two"):
    (texts / domain).mkdir(parents=True)
    for i in range(20):
      (texts / domain / f"{i}.txt").write_text(f"{domain} cat sat on the mat. "[i % 5 :] * 5)
  command = [f"--model={model}", "--dataset=text_folder", f"--text_folder={texts}", f"--data_dir={tmp_path}"]
  command += ["--sequence_length=16", "--batch_size=2", "--eval_batches=2", "--devices=3"]
  outputs = [tmp_path / name for name in ("whole", "stream")]
  recorded = tmp_path / "beside" / "router_logits" / "steps_000000000001.npy"
  disk.write_text(recorded, "of another examination that is under way")
  commands = [
    [SCRIPT, *command, "--replay=loss_free_bias:0.01", f"--output_dir={outputs[0]}"],
    [SCRIPT, *command, "--replay=loss_free_bias:0.01", f"--output_dir={outputs[1]}", "--stream"],
    [SCRIPT, *command, f"--output_dir={outputs[0]}"],
    [SCRIPT, *command, "--replay=loss_free_bias:0.01", f"--output_dir={tmp_path}/beside"],
    [SCRIPT, *command, f"--output_dir={texts}/examined"],
    [SCRIPT, *command, f"--output_dir={texts}"],
  ]
  with locks.hold(tmp_path / "beside" / locks.LOCK, "the other one"):
    whole, stream, again, beside, inside, wrong = run_scripts(*commands)
  assert again.status == 0 and not any((outputs[0] / "router_logits").iterdir())  # those of before are gone
  assert_one_line(beside, f"--output_dir={tmp_path}/beside: in use by process {os.getpid()} on ")
  assert recorded.exists()
  assert_one_line(inside, f"{texts}/examined: is in the folder of the text, --text_folder={texts}, so")
  assert not (texts / "examined").exists()
  assert whole.status == stream.status == 0, (whole, stream)
  assert "report.html" in whole.stdout and " - " in whole.stdout  # three devices for four experts
  for name, keys in (("layers.csv", {"max_vio", "information_domain"}), ("replays.csv", {"max_vio"})):
    one, other = (list(csv.DictReader((output / name).open())) for output in outputs)
    assert len(one) == len(other) == (2 if name == "layers.csv" else 1)
    for key in keys:
      assert [float(row[key]) for row in one] == pytest.approx([float(row[key]) for row in other], rel=1e-4)
  assert_one_line(wrong, f"--output_dir={texts}: holds something else; choose another folder")
