"""Wrong input of every kind ends with one line: no traceback, no hang. Drawn by Hypothesis.

python -m pytest tests/test_fuzz.py -n 0
python -m pytest tests/test_fuzz.py -n 0 --hypothesis-profile=nightly    # five hundred cases of each kind
"""

import contextlib
import functools
import io
import json
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moe_jax import disk, sharding
from moe_jax.analysis.recording import recorded_config
from moe_jax.comparison import report
from moe_jax.comparison.folder import ComparisonFolder
from moe_jax.comparison.results import load_config, load_results, warnings
from moe_jax.data import prompts
from moe_jax.data.bpe import train_bpe
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.interop.describe import describe
from moe_jax.interop.folder import INDEX, open_folder
from moe_jax.interop.load import read_model_config
from moe_jax.interop.safetensors import open_file
from moe_jax.models import PRESETS, VOCAB_SIZES
from moe_jax.nn.build import resolve
from moe_jax.training import identity
from moe_jax.training.compiled import check_run, resolve_config
from moe_jax.training.load import load_run
from moe_jax.training.metric_writer import JsonlWriter, read_jsonl, read_lines
from moe_jax.training.router_trace import Trace, TraceWriter
from tests import tiny
from tests.comparison.made_results import make_result
from tests.fuzz.commands import Child, command_lines, problem
from tests.fuzz.values import METHODS, SPECS, damaged_bytes, files

pytestmark = pytest.mark.timeout(3600)  # of five hundred cases
LIMIT = 30.0  # seconds that a case may take
SETTINGS = tiny.change(tiny.CONFIG, balancers="loss_free_bias:0.01", num_layers=1)
MESH = sharding.make_mesh(SETTINGS.mesh)
RESOLVED = resolve_config(SETTINGS)
RUN = RESOLVED.to_dict() | {"vocab_size": 32, "domains": ["a", "b"], "fingerprint": "0" * 64}
CLAIM = {"arms": {"a": {"jitter": 0.1}, "b": {}}, "seeds": [0, 1], "config": SETTINGS.to_dict()}
METRICS = [{"step": i, "loss": 1.5, "max_vio": [0.1, "NaN"]} for i in (1, 2, 3)]


def refused(call, *arguments) -> str:
  """The line with which a call is refused; empty if it is not. Any other exception is a failure."""
  started, line = time.monotonic(), ""
  try:
    call(*arguments)
  except InputError as error:
    line = " ".join(str(error).split())
    assert line
  assert time.monotonic() - started < LIMIT
  return line


@given(st.sampled_from(["router", "balancers", "experts", "dispatcher", "mixer", "ffn"]), METHODS | SPECS)
def test_parts_of_a_model(field, spec):
  refused(lambda: check_run(tiny.change(SETTINGS, **{field: spec}), MESH))


@given(st.sampled_from(["objective", "hooks", "optimizer", "trained", "schedule"]), METHODS | SPECS)
def test_parts_of_training(field, spec):
  refused(lambda: check_run(tiny.change(SETTINGS, **{field: spec}), MESH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz")


@given(content=files(RUN))
def test_config_json_of_a_run(folder, content):
  (folder / "config.json").write_bytes(content)
  assert refused(load_run, folder)  # at the latest because it has no checkpoint
  refused(identity.check_same_run, folder, RESOLVED, RUN["fingerprint"])


@given(content=files(CLAIM))
def test_config_json_of_a_comparison(folder, content):
  (folder / "config.json").write_bytes(content)
  load_config(folder)
  refused(ComparisonFolder(folder).check, CLAIM)
  refused(ComparisonFolder(folder).claim, CLAIM)


@functools.cache
def _published(name: str) -> dict:
  _, values = describe(resolve(PRESETS[name].model), VOCAB_SIZES[name])
  numbers = {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
  return values | numbers | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


TINY = [
  f"{name}_tiny"
  for name in ("mixtral_8x7b", "deepseek_v3", "minimax_text_01", "qwen2_57b_a14b", "gpt_oss_20b")
]


@given(content=st.sampled_from(TINY).flatmap(lambda name: files(_published(name))))
def test_config_json_of_a_published_model(folder, content):
  (folder / "config.json").write_bytes(content)
  refused(read_model_config, folder)


_PLACES = {"a": ("F32", [2], [0, 8]), "b": ("BF16", [1, 2], [8, 12]), "c": ("U8", [0], [12, 12])}
HEADER = {
  name: dict(zip(("dtype", "shape", "data_offsets"), place, strict=True)) for name, place in _PLACES.items()
}


@st.composite
def safetensors_files(draw):
  """A file with a damaged header, of which it has the length, or damaged anywhere."""
  whole = draw(st.booleans())
  header = json.dumps(HEADER).encode() if whole else draw(files(HEADER))
  data = len(header).to_bytes(8, "little") + header + bytes(range(12))
  return draw(damaged_bytes(data)) if whole else data


@given(content=safetensors_files())
def test_safetensors(folder, content):
  """What is accepted has every byte in one tensor."""
  path = folder / "model.safetensors"
  path.write_bytes(content)
  found = {}
  if not refused(lambda: found.update(open_file(path))):
    length = int.from_bytes(content[:8], "little")
    parts = [x.tobytes() for x in found.values()]
    assert sorted(b"".join(parts)) == sorted(content[8 + length :])


@given(
  content=files({"metadata": {"total_size": 12}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
)
def test_index_of_a_checkpoint(folder, content):
  (folder / "indexed").mkdir(exist_ok=True)
  for file in ("1", "2"):
    (folder / f"indexed/{file}.safetensors").touch()
  (folder / "indexed" / INDEX).write_bytes(content)
  # At the latest because its files are empty, unless it names none.
  assert refused(open_folder, folder / "indexed", {}) or json.loads(content)["weight_map"] == {}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
  """The folder of a trace, and what its header should hold."""
  folder = tmp_path_factory.mktemp("trace")
  header = {"router": "softmax_topk", "moe": SETTINGS.to_dict()["model"]["moe"], "layers": [0]}
  with TraceWriter(folder, header) as writer:
    arrays = {"logits_RBLE": np.zeros((1, 2, 4, 8), np.float16), "mask_BL": np.ones((2, 4), bool)}
    writer.add(1, arrays | {"domain_B": np.zeros(2, np.int32), "key_B": np.zeros((2, 2), np.uint32)})
  return folder


@given(data=st.data())
def test_traces(trace, data):
  header, steps = trace / "header.json", next(trace.glob("steps_*.npy"))
  before = header.read_bytes(), steps.read_bytes()
  try:
    if data.draw(st.booleans()):
      content = data.draw(files(json.loads(before[0])))
      header.write_bytes(content)
      with contextlib.suppress(ValueError, RecursionError):  # as one whose digest fits
        refused(recorded_config, types.SimpleNamespace(folder=trace, header=json.loads(content)))
    else:
      steps.write_bytes(data.draw(damaged_bytes(before[1])))

    def read() -> None:
      found = Trace(trace)
      recorded_config(found)
      list(found.chunks())

    refused(read)
  finally:
    header.write_bytes(before[0])
    steps.write_bytes(before[1])


RESULT = make_result("a") | {
  "metric_lines": 3,
  "config": SETTINGS.to_dict(),
  "model": {"num_experts": [4], "num_layers": 2},
}


@given(content=st.sampled_from([RESULT, disk.with_digest(RESULT)]).flatmap(files))
def test_result_json(folder, content):
  """What is taken for a result can be compared and shown."""
  path = folder / "compared/arms/a/seed_0/result.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  other = make_result("b")
  results = [*load_results(folder / "compared"), other]
  console = Console(file=io.StringIO())
  refused(report.print_table, report.summarise(results), console)
  refused(report.print_differences, report.paired_differences(results), console)
  warnings(folder / "compared", results)
  ComparisonFolder(folder / "compared").merge_metrics((r["arm"], r["seed"]) for r in results)
  refused(ComparisonFolder(folder / "compared").check_text, RESULT["fingerprint"])


@given(
  content=damaged_bytes("".join(json.dumps(line) + "\n" for line in METRICS).encode()) | files(METRICS[0])
)
def test_metrics(folder, content):
  path = folder / "metrics.jsonl"
  path.write_bytes(content)
  refused(read_jsonl, path)
  read_lines(path)
  JsonlWriter(path, resume_step=2).close()
  assert all(line["step"] <= 2 for line in read_jsonl(path))


EXAMPLE = {"prompt": "2 + 2 =", "response": "4", "task": "sums"}


@given(content=st.lists(files(EXAMPLE), min_size=1, max_size=3).map(b"\n".join))
def test_prompts(folder, content):
  path = folder / "prompts.jsonl"
  path.write_bytes(content)
  if not refused(prompts.read_jsonl, path):
    assert all(example.response for example in prompts.read_jsonl(path))


BPE = train_bpe(["the cat sat on a mat " * 40], 280)


@given(content=damaged_bytes(BPE) | files(json.loads(BPE)), text=st.text(max_size=20))
def test_tokenizer_json(folder, content, text):
  path = folder / "tokenizer.json"
  path.write_bytes(content)

  def use() -> None:
    tokenizer = load_tokenizer(str(path))
    tokenizer.decode(tokenizer.encode(text))

  refused(use)


@pytest.fixture(scope="module")
def child(folder):
  made = Child(folder)
  yield made
  made.close()


@given(data=st.data())
def test_command_lines(child, data):
  script, arguments = data.draw(command_lines(child))
  assert not problem(child.ask(script, arguments)), (script, arguments)
