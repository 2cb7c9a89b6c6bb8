"""Compiles the training step for devices that are described but not present."""

import dataclasses
import functools
import importlib.util
import json
import re
import time
import types

import jax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh

from moe_jax import sharding
from moe_jax.analysis import ahead_of_time, flops, mesh_search, topology
from moe_jax.analysis.collectives import purpose
from moe_jax.analysis.memory import GIB, memory_of, out_of_memory
from moe_jax.config import BlockConfig, Config, MeshConfig, ModelConfig, Segment
from moe_jax.errors import InputError
from moe_jax.models import preset
from moe_jax.training.compiled import abstract_model, check_run, resolve_config
from tests import tiny
from tests.scripts import assert_one_line, run_scripts

CONFIG = tiny.change(
  tiny.CONFIG,
  balancers="switch_loss:0.1",
  jitter=0.0,
  dispatcher="einsum",
  capacity_factor=2.0,
  num_layers=3,
  remat="full",
)
HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None


def compiled(config: Config) -> tuple:
  """The resolved configuration, its mesh, and its compiled step."""
  mesh = sharding.make_mesh(config.mesh)
  config = check_run(config, mesh)
  return config, mesh, ahead_of_time.compile_train_step(config, tiny.VOCAB, mesh)


@functools.cache
def report(config: Config) -> dict:
  config, mesh, step = compiled(config)
  return ahead_of_time.report(config, tiny.VOCAB, mesh, step)


def on(config: Config, **axes) -> Config:
  return dataclasses.replace(config, mesh=MeshConfig(**axes))


def test_a_scan_counts_as_the_same_layers_unrolled():
  scanned, unrolled = (
    report(tiny.change(on(CONFIG, data=2, expert=4), scan_layers=scan, remat="none"))
    for scan in (True, False)
  )
  assert scanned["unknown_loops"] == unrolled["unknown_loops"] == []
  assert scanned["flops"]["compiled"] == pytest.approx(unrolled["flops"]["compiled"], rel=0.02)
  exchanged = [[r for r in one["collectives"] if r["kind"] == "all-to-all"] for one in (scanned, unrolled)]
  assert exchanged[0] == exchanged[1]


@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("full", 3), ("exchange", 2)])
def test_experts_multiply_their_slots_and_tokens_travel_to_them_as_often_as_layers_run(remat, passes):
  """Forward, backward and, where the forward pass is recomputed, once more. Nothing is counted but slots."""
  found = report(tiny.change(on(CONFIG, data=2, expert=4), remat=remat))
  model, moe = CONFIG.model, CONFIG.model.moe
  assert found["flops"]["experts_ratio"] == pytest.approx(moe.capacity_factor)
  assert found["flops"]["parts"]["head"] == 3 * 2 * 16 * model.model_dim * tiny.VOCAB  # of the 16 tokens here
  assert sum(found["flops"]["parts"].values()) == pytest.approx(found["flops"]["compiled"])
  (row,) = (row for row in found["collectives"] if row["kind"] == "all-to-all")
  assert row["axes"] == ["expert"] and row["count"] == 2 * passes * 3  # there and back, 3 layers
  rows = 16 * moe.num_experts_per_token * 3 / 4  # a quarter of the experts is here
  assert found["exchange"]["must_move_bytes"] == rows * model.model_dim * 4 * 2 * passes * 3
  assert found["exchange"]["ratio"] == pytest.approx(moe.capacity_factor)


@pytest.mark.parametrize(
  ("config", "reordered"),
  [
    (tiny.change(on(CONFIG, data=2, expert=4), remat="none"), 0.0),
    (on(CONFIG, data=2, fsdp=4), 0.01),  # of the embedding's gradient, by an all-to-all in JAX 0.12
    # XLA scatters gradients of what tensor keeps whole over all devices first, and then puts the parts in order.
    (tiny.change(on(CONFIG, data=1, fsdp=2, expert=2, tensor=2), dispatcher="dropless"), 0.02),
  ],
  ids=["expert", "fsdp", "fsdp x expert x tensor"],
)
def test_the_layouts_explain_every_collective(config, reordered):
  rows = report(config)["collectives"]
  unexplained = [row for row in rows if not row["purpose"]]
  sends = lambda rows: sum(row["sent_bytes"] for row in rows)
  assert len(rows) > 1 and sends(unexplained) <= reordered * sends(rows)
  assert {row["kind"] for row in unexplained} <= {"collective-permute", "all-to-all"}
  assert not purpose("all-gather", ["data"]) and not purpose("all-gather", ["expert"])  # the check can fail


def test_arguments_are_the_state_and_the_batch():
  config = on(CONFIG, data=2, fsdp=4)
  mesh = AbstractMesh((1, 2, 4, 1, 1), sharding.MESH_AXES)
  state = mesh_search.state_bytes(config, tiny.VOCAB, mesh)
  batch = 8 * 16 * (4 + 4 + 1) // 8 + 8 * 4 // 8
  assert report(config)["memory_bytes"]["arguments"] == pytest.approx(state + batch, abs=64)


def test_state_is_three_times_the_parameters():
  """Parameters and the two moments of AdamW, of which fsdp keeps a part on each device."""
  params = nnx.state(abstract_model(resolve_config(CONFIG), tiny.VOCAB), nnx.Param)
  whole = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  of = lambda *sizes: mesh_search.state_bytes(CONFIG, tiny.VOCAB, AbstractMesh(sizes, sharding.MESH_AXES))
  assert of(1, 8, 1, 1, 1) == pytest.approx(whole, rel=0.01)
  assert of(1, 1, 8, 1, 1) == pytest.approx(whole / 8, rel=0.1)


def test_model_operations_of_mixtral():
  """Against 6 times the active parameters that products read (12.88e9 without the embedding's look-up) and the scores."""
  model = preset("mixtral_8x7b").model
  found = flops.forward_flops(model, 32_000, 4096)
  scores = 32 * 4 * 4096 * 4097 / 2
  norms = 65 * 4096
  assert found.forward - scores == pytest.approx(2 * (12.749e9 - norms), rel=1e-4)


def test_operations_of_a_step_by_hand():
  """8 sequences of 16 tokens, 3 layers: D = 16, two heads of 8, one key-value head, 2 of 8 experts with F = 16."""
  attention = (
    16 * 8 * (2 + 1 + 1) + 16 * 16 + 2 * 16 * 17 / 2
  )  # q, k, v and out; scores and values of what is before
  layers = 3 * 2 * (attention + 16 * 8 + 2 * 3 * 16 * 16)
  for remat, again in (("full", 1), ("none", 0)):
    config = tiny.change(CONFIG, remat=remat)
    found = flops.step_flops(config, tiny.VOCAB)
    assert found == (8 * 16 * 3 * (layers + 2 * 16 * tiny.VOCAB), 8 * 16 * again * layers)
    assert flops.expert_flops(config, tiny.VOCAB) == 8 * 16 * (3 + again) * 3 * 2 * 2 * 3 * 16 * 16


@pytest.mark.parametrize(
  ("fields", "devices", "kept"),
  [
    ({"dispatcher": "einsum"}, 1, 1),
    ({"dispatcher": "all_to_all"}, 2, 1),
    ({"dispatcher": "all_to_all"}, 1, 0),  # nothing is exchanged, so nothing is kept
    ({"dispatcher": "all_gather"}, 2, 0),
    ({"dispatcher": "sorted", "experts": "quantised:format=int4"}, 1, 1),
    ({"dispatcher": "sorted", "mtp_depth": 2, "objective": "next_tokens"}, 1, 1),
  ],
  ids=str,
)
def test_remat_exchange_repeats_all_but_the_last_product_of_experts(fields, devices, kept):
  full, exchange = (tiny.change(CONFIG, **fields, remat=remat) for remat in ("full", "exchange"))
  layers = 3 + full.model.mtp_depth
  last = kept * 8 * 16 * layers * 2 * 2 * 16 * 16
  again = [flops.step_flops(config, tiny.VOCAB, devices).recomputed for config in (full, exchange)]
  experts = [flops.expert_flops(config, tiny.VOCAB, devices) for config in (full, exchange)]
  assert again[0] - again[1] == experts[0] - experts[1] == last


def test_operations_of_multi_token_prediction_by_hand():
  """A module has a matrix from 2 D to D, a block like the last, and the model's output matrix."""
  config = tiny.change(CONFIG, remat="full")
  ahead = tiny.change(config, mtp_depth=2, objective="next_tokens")
  attention = 16 * 8 * (2 + 1 + 1) + 16 * 16 + 2 * 16 * 17 / 2
  block = 2 * (attention + 16 * 8 + 2 * 3 * 16 * 16)
  (with_it, with_again), (without, again) = (flops.step_flops(c, tiny.VOCAB) for c in (ahead, config))
  assert with_it - without == 8 * 16 * 3 * 2 * (block + 2 * 2 * 16 * 16 + 2 * 16 * tiny.VOCAB)
  assert with_again - again == 8 * 16 * 2 * block
  experts = flops.expert_flops(ahead, tiny.VOCAB) - flops.expert_flops(config, tiny.VOCAB)
  assert experts == 8 * 16 * 4 * 2 * 2 * 2 * 3 * 16 * 16


def of_segments(first: int, second: int) -> ModelConfig:
  """`first` dense layers, then pairs of other experts, and a window in one of them: 7 layers with (1, 3)."""
  moe = CONFIG.model.moe
  narrow = dataclasses.replace(
    moe, num_experts=4, num_experts_per_token=1, experts="relu", num_shared_experts=2
  )
  wide = dataclasses.replace(moe, num_experts_per_token=3, expert_dim=24)
  pattern = (BlockConfig(moe=narrow), BlockConfig(mixer="attention:window=4", ffn="parallel_moe", moe=wide))
  segments = Segment((BlockConfig(ffn="mlp"),), first), Segment(pattern, second)
  model = dataclasses.replace(CONFIG.model, num_layers=ModelConfig.num_layers, dense_dim=20)
  return dataclasses.replace(model, segments=segments)


def test_operations_of_segments_by_hand():
  """D = 16, two heads of 8, one key-value head; 16 positions, of which a window of 4 shows 1, 2, 3, 4, 4, ..."""
  found = flops.forward_flops(of_segments(1, 3), tiny.VOCAB, 16)
  assert found.attention_projections == 7 * 2 * 16 * 8 * (2 + 1 + 1 + 2)
  assert found.attention_scores == 2 * 2 * 16 * (4 * 17 / 2 + 3 * (1 + 2 + 3 + 13 * 4) / 16)
  assert found.router == 3 * 2 * 16 * (4 + 8)
  assert found.experts == 3 * 2 * (1 * 2 * 16 * 16 + 3 * 3 * 16 * 24)
  assert found.shared_experts == 3 * 2 * 3 * 16 * 2 * 16  # SwiGLU of the width of two experts
  assert found.dense == (1 + 3) * 2 * 3 * 16 * 20
  assert found.head == 2 * 16 * tiny.VOCAB


def test_experts_of_other_parts_work_on_their_own_rows():
  """Soft MoE: its slots, however many tokens there are. Low-rank additions: two thin matrices beside each one."""
  soft = tiny.change(CONFIG, ffn="soft_moe:slots=6", accept_leaks="soft_moe", balancers="none")
  rows, matrices = 8 * 6 / 16, 3 * 16 * 16
  assert flops.forward_flops(soft.model, tiny.VOCAB, 16).experts == 3 * 2 * rows * matrices
  adapted = tiny.change(CONFIG, experts="low_rank:rank=2")
  found = flops.forward_flops(adapted.model, tiny.VOCAB, 16)
  assert found.experts == 3 * 2 * 2 * (matrices + 3 * 2 * (16 + 16))


@pytest.fixture
def no_compilation_cache():
  """A program that is found there takes no time to compile."""
  used = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it asks once
  yield
  jax.config.update("jax_enable_compilation_cache", used)
  compilation_cache.reset_cache()


def test_compile_time_follows_the_blocks_and_not_the_depth(no_compilation_cache):
  """61 layers against 12, of two segments: the same program with other numbers in it, traced and compiled as fast."""
  depths = ((12, 2), (61, 3))
  few, many = (tiny.change(CONFIG, num_layers=layers, num_dense_first=first) for layers, first in depths)
  seconds, lines = {few: [], many: []}, {}
  for config in (few, many) * 2:  # alternating, and the better of two, because others use the machine, too
    start = time.process_time()
    *_, step = compiled(config)
    seconds[config].append(time.process_time() - start)
    lines[config] = step.text.count(" = ")
  assert lines[many] < 1.02 * lines[few]
  assert min(seconds[many]) < 1.3 * min(seconds[few])


def test_every_mesh_is_found_once():
  found = list(mesh_search.all_meshes(16, num_slices=2))
  assert len(found) == len(set(found)) == 20  # 2^3 over 4 axes: (3 + 3 choose 3)
  assert all(m.slice == 2 and m.data * m.fsdp * m.expert * m.tensor == 8 for m in found)


def test_refusals_of_the_compiler_are_read():
  message = (
    "RESOURCE_EXHAUSTED: ... Ran out of memory in memory space hbm. Used 33.80G of 31.25G hbm. Exceeded"
  )
  assert out_of_memory(message) == (33.80 * GIB, 31.25 * GIB)
  message = (
    "HBM, the total memory required for HLO temporaries (26.56G) exceeds available HBM (23.50G). HLO module"
  )
  assert out_of_memory(message) == (26.56 * GIB, 23.5 * GIB)
  assert out_of_memory("INVALID_ARGUMENT: no") is None


@pytest.mark.parametrize("name", ["cpu:0", "cpu:", "cpu:4x4"])
def test_wrong_cpu_topologies(name):
  with pytest.raises(InputError, match=f"--topology={name}: cpu:N with N from 1"):
    topology.devices_of(name)


def test_a_missing_tpu_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install -e '.\[tpu\]'; cpu:8 needs none"):
    topology.devices_of("v5p:4x4x4")


def test_memory_of_a_tpu_is_hbm_alone():
  """Its temporaries count on-chip memories too."""

  class Compiled:
    @staticmethod
    def memory_analysis():
      sizes = {"argument": 100, "output": 90, "alias": 80, "temp": 70, "generated_code": 3}
      named = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
      return types.SimpleNamespace(**named, total_allocation_bytes=160)

  assert (memory_of(Compiled, "TPU v5").temporaries, memory_of(Compiled, "TPU v5").peak) == (50, 163)
  assert memory_of(Compiled, "cpu").temporaries == 70


def test_a_limit_of_memory_is_for_tpus():
  class Device:
    platform = "tpu"

  assert topology.compiler_options([Device], 23.5)["xla_tpu_max_hbm_size_mib"] == "24064"
  assert "xla_tpu_max_hbm_size_mib" not in topology.compiler_options([Device])
  assert topology.compiler_options(jax.devices(), 23.5) == {}


SMALL = ("--preset=tiny", "--num_layers=1", "--dispatcher=einsum", "--sequence_length=16")
COMPILE = ["scripts/aot_compile.py", *SMALL]
WRONG = [
  ("--expert_parallelism=3", "--expert_parallelism=3: the axes must multiply to the 2 devices here"),
  ("--topology=cpu:x", "--topology=cpu:x: cpu:N with N from 1 to 9999 virtual devices"),
]


@pytest.mark.slow
def test_the_scripts_end_to_end(tmp_path):
  """One mesh, then the same mesh as the search's and the table's, and wrong flags."""
  out = tmp_path / "found.json"
  one, search, table, *wrong = run_scripts(
    [*COMPILE, "--topology=cpu:2", "--expert_parallelism=2", f"--output={out}"],
    [*COMPILE, "--topology=cpu:2", "--search", "--search_tries=2"],
    ["scripts/scaling_table.py", *SMALL, "--topologies=cpu:2", "--expert_parallelism=2"],
    *([*COMPILE, "--topology=cpu:2", flag] for flag, _ in WRONG),
  )
  assert one.status == search.status == table.status == 0, (one, search, table)

  saved = json.loads(out.read_text())
  result = saved["result"]
  assert saved["preset"] == "tiny" and result["mesh"]["expert"] == 2
  printed = dict(re.findall(r"^ +(\w+) +([\d.e+-]+) (?:T|MiB)", one.stdout, re.MULTILINE))
  for name in ("model", "recomputed", "compiled"):
    assert float(printed[name]) == pytest.approx(result["flops"][name] / 1e12, rel=1e-3)
  for name in ("arguments", "temporaries"):
    assert float(printed[name]) == pytest.approx(result["memory_bytes"][name] / 2**20, abs=1e-3)
  assert "mesh: expert=2 (2 cpu)" in one.stdout and "capacity unknown" in one.stdout

  lines = search.stdout.splitlines()
  assert lines[0] == "4 meshes divide the model and can hold its state; compiling 2"
  sent = [float(line.split()[-2]) for line in lines[2:]]
  assert len(sent) == 2 and sent == sorted(sent)
  (ratio,) = (line.split()[-1] for line in lines if line.startswith("expert=2 "))
  assert float(ratio) == pytest.approx(result["flops"]["ratio"], abs=1e-3)

  (line,) = table.stdout.splitlines()[2:]
  gflops = f"{result['flops']['compiled'] / 1e9:.6g}"
  assert line.startswith(f"| cpu:2 | 2 | expert=2 | 64 | {gflops} | ") and "all-to-all expert" in line

  for ended, (_, message) in zip(wrong, WRONG, strict=True):
    assert_one_line(ended, message)


needs_tpu_compiler = pytest.mark.skipif(
  not HAS_TPU_COMPILER, reason="needs the TPU compiler: pip install -e '.[tpu]'"
)


@needs_tpu_compiler
def test_unknown_tpu_topology():
  (ended,) = run_scripts([*COMPILE, "--topology=v5p:3x3x3"])
  assert_one_line(ended, "error: --topology=v5p:3x3x3: unknown to the TPU compiler (")


@needs_tpu_compiler
@pytest.mark.slow
def test_the_script_for_a_tpu_slice(tmp_path):
  out = tmp_path / "found.json"
  half = ["--compute_dtype=bfloat16", "--sequence_length=256", "--remat=full"]
  (ended,) = run_scripts([*COMPILE, *half, "--topology=v5e:2x4", "--expert_parallelism=4", f"--output={out}"])
  assert ended.status == 0, ended
  result = json.loads(out.read_text())["result"]
  assert result["device_kind"] == "TPU v5 lite" and result["fits"]
  assert result["unknown_loops"] == []
  assert result["flops"]["experts_ratio"] == pytest.approx(1.25, rel=0.05)
  of_attention = {name: runs for name, runs in result["kernels"].items() if "splash" in name}
  assert of_attention == {"splash_mha_fwd": 2, "splash_mha_dq": 1, "splash_mha_dkv": 1}  # recomputed once
