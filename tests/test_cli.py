"""The command line: every flag has a help, and wrong ones end with one line."""

import dataclasses
import os
import re
import subprocess
import sys
import time

import pytest

from moe_jax import cli
from moe_jax.config import Config
from moe_jax.nn.ffn import FFNS
from moe_jax.nn.mixers import MIXERS
from tests.scripts import ROOT, assert_one_line, run_scripts

EXPERIMENTS = (
  "load_balancing",
  "routers",
  "capacity",
  "replay",
  "communication",
  "imbalance",
  "speedrun",
  "upcycle",
)
TWO = ["--num_processes=2", "--process_id=0", "--coordinator_address=127.0.0.1:55991"]
WRONG = [
  (["--num_expert=3"], "unknown flag '--num_expert': did you mean --num_experts"),
  (["--seed=3"], "unknown flag '--seed': did you mean --seeds"),
  (
    ["--balancer=none"],
    "unknown flag '--balancer': this command sets what --balancers would; --help lists all",
  ),
  (["--seeds=many"], "flag --seeds=many"),
  (["arms"], "unexpected argument 'arms'"),
  (["--preset=tinny"], "unknown preset 'tinny': did you mean tiny"),
  (["--num_experts=2", "--num_experts_per_token=4"], "--num_experts_per_token=4: must be between 1 and"),
  (["--dataset=text_folder", "--text_folder=/no/such/folder"], "--text_folder=/no/such/folder"),
  (["--dataset=stdlibb"], "unknown dataset 'stdlibb': did you mean stdlib"),
  (["--router=softmax_top"], "--router=softmax_top: unknown router 'softmax_top': did you mean softmax_topk"),
  (["--router=top_p:p=2"], "--router=top_p:2.0: router top_p: p must be in (0, 1), got 2.0"),
  (["--router=switch_top1"], "--num_experts_per_token=2: router switch_top1 takes 1"),
  (
    ["--router=expert_choice"],
    "--router=expert_choice: in a causal model its output depends on later tokens",
  ),
  (
    ["--methods=loss_free_bias@hash_topk"],
    "--balancers=loss_free_bias: the balancer moves the choice by a bias",
  ),
  (["--experts=swiglue"], "--experts=swiglue: unknown experts 'swiglue': did you mean swiglu"),
  (["--mixer=attention:window=-1"], "mixer attention: window must be 0"),
  (["--ffn=soft_mo"], "--ffn=soft_mo: unknown ffn 'soft_mo': did you mean soft_moe"),
  (["--objective=masked_lm:2"], "--objective=masked_lm:2: objective masked_lm: rate must be in (0, 1)"),
  (["--optimizer=adam"], "--optimizer=adam: unknown optimizer 'adam': did you mean adamw"),
  (["--hooks=averag"], "--hooks=averag: unknown hook 'averag'"),
  (["--plugins=no_such.py"], "--plugins=no_such.py: no such file"),
  (["--dispatcher=all_to_all:chunks=0"], "dispatcher all_to_all: chunks must be 1 or more"),
  (["--sweep=learning_rat:1,2"], "--sweep=learning_rat:1,2: unknown field, and option of these arms"),
  (["--sweep=weight:0.1,0.2", "--sweep_seeds=0"], "--sweep_seeds=0: 0 is reported, too"),
  (
    ["--first_seed=100", "--seeds=2", "--sweep=weight:0.1,0.2"],
    "--sweep_seeds=100,101: 100 is reported, too",
  ),
  (["--num_experts=1" + "0" * 30], "000: must be below 2^31"),
  (["--dispatcher=sorted", "--capacity_factor=inf"], "--capacity_factor=inf: must be a finite number"),
  (["--weight_decay=nan"], "--weight_decay=nan: must be a finite number"),
  (["--weight_decay=-1"], "--weight_decay=-1.0: must be 0 or more"),
  (["--norm_eps=nan"], "--norm_eps=nan: must be a finite number"),
  (["--final_learning_rate_fraction=-5"], "--final_learning_rate_fraction=-5.0: must be in [0, 1]"),
  (
    ["--methods=switch_loss:-1"],
    "--balancers=switch_loss:-1: balancer switch_loss: weight must be 0 or more",
  ),
  (["--methods=loss_free_bias:-1"], "balancer loss_free_bias: rate must be 0 or more"),
  (["--methods=none, none"], "--methods=none, none: an arm is named twice"),
  (["--methods=z_loss : 1,z_loss:1"], "an arm is named twice"),
  (["--accept_leaks=nope"], "--accept_leaks=nope: unknown router 'nope'"),
  (["--seeds=1000000000"], "flag --seeds=1000000000"),
  (["--dataset=markov", "--markov_states=200000"], "--markov_states=200000: at most 67108864 transition"),
  (
    ["--dataset=markov", "--sequence_length=999999"],
    "--sequence_length=999999: --dataset=markov draws 512 windows",
  ),
  (["--dataset=huggingface:foo"], "--dataset=huggingface:foo: must be stdlib, stdlib_tasks, markov"),
  (["--data_dir=/proc/no/such"], "/proc/no: No such file or directory"),
  (["--dataset=text_folder", "--text_folder=" + "a" * 5000], "aaa...: File name too long"),
  (["--output_dir=/dev/null/x"], "--output_dir=/dev/null/x: /dev/null is a file"),
  (["--output_dir=" + "a" * 300], "cannot be a folder (File name too long)"),
  (["--output_dir=/proc/x"], "--output_dir=/proc/x: /proc cannot be written"),
  (["--output_dir=a[b]"], "'[' in the path"),
  (["--max_minutes=-1"], "--max_minutes=-1.0: must be 0 or more"),
  (["--initialization_timeout=inf"], "--initialization_timeout=inf: must be seconds from 1 to 1,000,000"),
  (["--initialization_timeout=-5"], "--initialization_timeout=-5.0: must be seconds from 1 to"),
  (["--heartbeat_timeout=nan", *TWO], "--heartbeat_timeout=nan: must be seconds from 1 to 1,000,000"),
  (["--heartbeat_timeout=1e12", *TWO], "--heartbeat_timeout=1000000000000.0: must be seconds from 1 to"),
  (["--shard=3/2"], "--shard=3/2: must be i/n with i from 1 to n"),
]
# They hold whole models, and are refused before they look at one.
ALONE = [
  *((name, "--model=x") for name in ("quantise", "compress", "finetune", "finetune_arms", "distil")),
  *(("round_trip",), ("reinforce",), ("upcycle",), ("instruct", "--dense=x", "--sparse=x")),
]
NOT_WRITABLE = ["--output_dir=/proc/x"]
WRONG_OF_OTHERS = [
  ("experiments/capacity.py", ["--capacity_factors=1,x"], "--capacity_factors=x: must be a number above 0, or none"),
  ("experiments/capacity.py", ["--group=batch,tree"], "--group=batch,tree: must be different ones of sequence,"),
  ("experiments/granularity.py", ["--arms=16x64"], "unknown arm '16x64': did you mean"),
  ("experiments/capacity.py", ["--methods=none@st_moe_topn"], "--router=st_moe_topn: in a causal model its output"),
  ("scripts/account.py", ["--vocab_size=18446744073709551615"], "vocab_size=18446744073709551615, sequence_length="),
  ("scripts/coefficients.py", ["--loss=foo"], "flag --loss=foo"),
  ("scripts/coefficients.py", ["--weight=-1"], "--weight=-1.0: must be 0 or more"),
  ("scripts/coefficients.py", ["--num_experts_per_token=9"], "--num_experts_per_token=9: must be at most num_experts=8"),
  ("scripts/bench_layer.py", ["--num_experts_per_token=17"], "--num_experts_per_token=17: must be between 1 and num_ex"),
  ("scripts/bench_layer.py", ["--num_tokens=8", "--dispatchers=einsum:abc"], "--dispatchers=einsum:abc: must be NAME or"),
  ("experiments/upcycle.py", ["--trained=expert"], "--trained=expert: matches no parameter; did you mean experts"),
  ("experiments/compress.py", ["--model=x", "--methods=usag"], "unknown method 'usag': did you mean usage"),
  ("experiments/compress.py", ["--model=x", "--experts=8,four"], "--experts=four: must be numbers of experts"),
  ("experiments/compress.py", ["--model=x", "--experts=4,04"], "--experts=4,4: one of them is named twice"),
  ("experiments/finetune_arms.py", ["--model=x", "--arms="], "--arms=: must be different arms, e.g. all,all_but_experts"),
  ("experiments/upcycle.py", ["--shard=1/2"], "unknown flag '--shard'"),
  ("experiments/compress.py", ["--model=x", "--seeds=2"], "--seeds=2: --model=x names one model; put {seed}"),
  ("experiments/quantise.py", ["--model=x", "--formats=int4:x"], "--formats=int4:x: a group is a number of rows"),
  ("experiments/quantise.py", ["--model=nowhere"], "nowhere"),
  *((f"experiments/{name}.py", [*flags, *TWO], "--num_processes=2: this command is for one") for name, *flags in ALONE),
  ("experiments/finetune.py", ["--model=nowhere"], "nowhere"),
  ("experiments/round_trip.py", ["--model=nowhere"], "nowhere"),
  ("experiments/reinforce.py", ["--task=poems"], "flag --task=poems"),
  ("experiments/finetune_arms.py", ["--model=x", "--arms=expert"], "unknown arm 'expert': did you mean experts"),
  ("experiments/finetune_arms.py", ["--model=nowhere"], "nowhere: holds no run"),
  ("experiments/instruct.py", ["--dense=nowhere", "--sparse=x"], "nowhere: holds no run"),
  ("experiments/instruct.py", ["--dense=x"], "flag --sparse"),
  ("experiments/instruct.py", ["--dense=x", "--sparse=x", "--seed=0"], "unknown flag '--seed': did you mean --seeds"),
  ("experiments/distil.py", ["--model=nowhere", "--student_experts=4"], "nowhere: holds no run"),
  ("experiments/round_trip.py", ["--dataset=markov", "--domain=code"], "unknown domain 'code'"),
  ("experiments/round_trip.py", ["--formats=int3"], "unknown format 'int3': did you mean int8 or int4"),
  ("experiments/distil.py", ["--model=nowhere"], "nowhere: holds no run"),
  ("experiments/imbalance.py", ["--traces=nowhere", *NOT_WRITABLE], "/proc cannot be written"),
  ("experiments/replay.py", ["--trace=nowhere", *NOT_WRITABLE], "/proc cannot be written"),
  ("experiments/communication.py", ["--trace=nowhere", *NOT_WRITABLE], "/proc cannot be written"),
  ("experiments/finetune.py", ["--model=nowhere", *NOT_WRITABLE], "/proc cannot be written"),
  ("experiments/distil.py", ["--model=nowhere", *NOT_WRITABLE], "/proc cannot be written"),
  ("scripts/evaluate.py", ["--model=nowhere", "--json=/proc/x"], "--json=/proc: /proc cannot be written"),
  ("scripts/aot_compile.py", ["--output=/proc/x"], "--output=/proc: /proc cannot be written"),
  ("scripts/join.py", [], "no folders: give the folders of all shards"),
  ("scripts/join.py", ["tests"], "tests: holds no comparison"),
  ("scripts/pareto.py", ["--tables=defaults", "--output=x.png"], "defaults: has no summary.csv"),
  ("scripts/pareto.py", ["--output=x"], "--output=x: must end in .png"),
]  # fmt: skip


def test_wrong_flags_end_with_one_line_and_write_nothing(tmp_path):
  folder = tmp_path / "run"
  script = ["experiments/load_balancing.py", f"--output_dir={folder}"]
  wrong = [([*script, *flags], message) for flags, message in WRONG]
  for path, flags, message in WRONG_OF_OTHERS:
    writes = path.startswith("experiments/") or path == "scripts/join.py"
    wrong.append(([path, *([f"--output_dir={folder}"] if writes else []), *flags], message))
  for ended, (_, message) in zip(run_scripts(*(command for command, _ in wrong)), wrong, strict=True):
    assert_one_line(ended, message)
  assert not folder.exists()


def test_a_full_disk_is_one_line(tmp_path):
  """At the lock, the first file that a run writes, and in a file of a script that trains nothing."""
  run, texts = tmp_path / "run", tmp_path / "texts"
  commands = {
    run / ".lock": ["experiments/load_balancing.py", "--dataset=markov", "--preset=tiny", "--methods=none"],
    texts / "train.jsonl": ["scripts/instructions.py"],
  }
  ended = run_scripts(*([*c, f"--output_dir={p.parent}"] for p, c in commands.items()), file_bytes=0)
  for path, (status, _, stderr) in zip(commands, ended, strict=True):
    line = (
      f"error: {path}: no space left to write (File too large); make room, and the same command continues\n"
    )
    assert (status, stderr) == (2, line)


TOO_LARGE = [
  ["--preset=tiny", "--num_layers=1000000", "--num_experts=64"],
  ["--preset=tiny", "--num_experts=1000000000"],
  ["--preset=mixtral_8x7b", "--batch_size=64"],
]


def test_a_model_that_cannot_fit_is_one_line_and_writes_nothing(tmp_path):
  """Terabytes, of which nothing is allocated."""
  folder = tmp_path / "run"
  script = ["experiments/load_balancing.py", "--dataset=markov", "--methods=none", f"--output_dir={folder}"]
  started = time.monotonic()
  for status, _, stderr in run_scripts(*([*script, *flags] for flags in TOO_LARGE)):
    assert status == 2 and re.fullmatch(r"error: \S+ parameters need at least \S+ GiB .*\n", stderr), stderr
  assert not folder.exists() and time.monotonic() - started < 60


PRINTS = (
  "from moe_jax import cli\nfrom rich.console import Console\ncli.run(lambda argv: Console().print('x'))"
)


@pytest.mark.parametrize("command", [["scripts/account.py", "--model=mixtral_8x7b"], ["-c", PRINTS]])
def test_a_reader_that_is_gone_is_no_traceback(command):
  """As with `| head`."""
  read, write = os.pipe()
  os.close(read)
  with os.fdopen(write, "wb") as output:
    ended = subprocess.run(
      [sys.executable, *command], stdout=output, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
      cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
  assert (ended.returncode, ended.stderr) == (141, "")


def test_flags_without_effect_are_said(tmp_path):
  flags = [
    "--tokenizer=nope",
    "--capacity_factor=2",
    "--mixer=mla",
    "--qk_norm",
    "--head_dim=8",
    "--sweep_goal=nll",
  ]
  script = [
    "experiments/load_balancing.py",
    f"--output_dir={tmp_path}/run",
    "--dataset=markov",
    "--shard=9/2",
  ]
  dense = ["--ffn=mlp", "--expert_dim=32", "--capacity_factor=2"]
  frozen = ["--ffn=low_rank", "--router=sigmoid_topk", "--pack_examples"]  # which is a dense part
  with_experts, without, adapted = run_scripts([*script, *flags], [*script, *dense], [*script, *frozen])
  assert with_experts.stderr.splitlines()[:4] == [
    "note: --tokenizer has no effect without a data set of text",
    "note: --capacity_factor has no effect without a dispatcher with a capacity",
    "note: --qk_norm has no effect without a mixer that reads it",
    "note: --sweep_goal has no effect without --sweep",
  ]
  assert without.stderr.splitlines()[:2] == [
    "note: --expert_dim has no effect without --ffn with experts",
    "note: --capacity_factor has no effect without --ffn with experts",
  ]
  assert adapted.stderr.splitlines()[:2] == [
    "note: --router has no effect without --ffn with experts",
    "note: --pack_examples has no effect without a data set of prompts",
  ]


def test_what_mixers_do_not_read_is_known():
  names = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "qk_norm")
  unread = {mixer: tuple(n for n in names if not MIXERS.resolve(mixer).takes(n)) for mixer in MIXERS}
  assert {mixer: found for mixer, found in unread.items() if found} == cli._UNREAD


def test_which_feed_forward_parts_have_no_experts_is_known():
  assert [ffn for ffn in FFNS if not FFNS.resolve(ffn).takes("moe")] == [*cli._WITHOUT_EXPERTS]


def test_every_flag_has_a_help_and_its_default():
  for ended in run_scripts(*([f"experiments/{name}.py", "--helpshort"] for name in EXPERIMENTS)):
    flags = re.findall(r"^  --(?:\[no\])?(\w+): (.*)$", ended.stdout, re.MULTILINE)
    assert len(flags) > 60
    for name, text in flags:
      assert len(text) > 8 and text.replace(" ", "_") != name, (name, text)
    assert "--sequence_length: L, tokens of a sequence" in ended.stdout
    assert "(default: '128')" in ended.stdout


# Scripts that take no name of a method and load no model.
WITHOUT_PLUGINS = {
  *(
    "bench_decoding",
    "bench_loading",
    "check_attention",
    "coefficients",
    "exchange_overlap",
    "instructions",
    "join",
  ),
  *("models_table", "pareto", "render_tables", "soak", "soak_cluster", "soak_hosts", "soak_start"),
}


def test_every_script_that_takes_methods_shows_plugins():
  names = sorted({path.stem for path in (ROOT / "scripts").glob("*.py")} - WITHOUT_PLUGINS)
  ended = run_scripts(*([f"scripts/{name}.py", "--helpshort"] for name in names))
  shown = {name: "--plugins: Python files" in of.stdout for name, of in zip(names, ended, strict=True)}
  assert all(shown.values()), shown


def test_every_field_is_a_flag_or_said_to_be_none():
  no_flags = {"moe", "causal", "dense_ffn", "segments"}  # a part; the objective's; what only Python can say
  fields = [f for part in cli._PARTS.values() for f in dataclasses.fields(part)]
  assert {f.name for f in fields if "help" not in f.metadata} == no_flags


@pytest.mark.parametrize("preset", ["tiny", "mixtral_8x7b"])
def test_configurations_survive_json(preset):
  config = cli.PRESETS[preset]
  assert Config.from_dict(config.to_dict()) == config
