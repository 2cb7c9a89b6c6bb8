"""experiments/communication.py from end to end: what it records, counts and writes, and its answers to wrong flags."""

import csv

import pytest

from tests.analysis import studies

COUNTED = ["--nodes=2", "--devices_per_node=2", "--sequences_per_device=4", "--limits=1,2"]


WRONG = [
  (["--once_per=rack"], "--once_per=rack: must be one of expert, device, node"),
  (["--nodes=0"], "--nodes=0: must be 1 or more"),
  (
    ["--nodes=3"],
    "--nodes=3, --devices_per_node=4: the 12 devices cannot hold equal parts of the 32 experts",
  ),
  (["--sequences_per_device=300"], "of which there are 400"),
  (["--limits=few"], "--limits=few: must be whole numbers"),
  (["--routers=softmax_topk+copies"], "behind + comes shadow_bytes or shadow_time"),
  (["--routers=hash_topk"], "--routers=hash_topk: router by table: reads token ids"),
  (
    ["--trace=nowhere", "--num_steps=400", "--data_parallelism=1"],
    "leave out --num_steps, --data_parallelism",
  ),
  (["--balancers=loss_free_bias:0.01"], "--balancers=loss_free_bias:0.01: moves choices by a bias"),
  (["--trace=nowhere"], "nowhere: holds no router logits"),
]


def test_wrong_flags_are_one_line(tmp_path):
  studies.assert_refuses("communication", WRONG, tmp_path / "run")


def test_the_experiment_records_once_and_counts_any_run(tmp_path):
  record = [*studies.TINY_RUN, *COUNTED, f"--output_dir={tmp_path / 'one'}"]
  again = [f"--trace={tmp_path / 'one' / 'run'}", *COUNTED, "--once_per=node"]
  again += ["--routers=softmax_topk+shadow_time", f"--output_dir={tmp_path / 'two'}"]
  first, second = studies.run("communication", [record, again])
  assert first[0] == second[0] == 0, (first, second)

  plots = {"devices.png", "busiest_link.png", "step_time.png"}
  assert {path.name for path in (tmp_path / "one").iterdir()} == {"run", "summary.csv", "devices.csv", *plots}
  rows = list(csv.DictReader((tmp_path / "one" / "summary.csv").open()))
  arms = ["softmax_topk", "softmax+shadow_bytes", "softmax+shadow_time", "topology_aware_topk"]
  arms += [f"{what}_limited M={m}" for what in ("device", "node") for m in (1, 2)]
  assert [row["arm"] for row in rows] == [arm for arm in arms for _ in range(3)]
  plain = {row["once_per"]: row for row in rows if row["arm"] == "softmax_topk"}
  at_limit = {row["once_per"]: row for row in rows if row["arm"] == "node_limited M=2"}
  for once_per, row in plain.items():
    assert float(row["choices_kept"]) == 1.0
    assert row["network_bytes"] == at_limit[once_per]["network_bytes"]  # both of two nodes is no limit
  devices = list(csv.DictReader((tmp_path / "one" / "devices.csv").open()))
  assert len(devices) == 4 * len(rows)
  sums = [sum(float(d[side]) for d in devices) for side in ("sent_bytes", "received_bytes")]
  assert sums[0] == pytest.approx(sums[1])
  assert sums[0] == pytest.approx(sum(float(r["network_bytes"]) + float(r["local_bytes"]) for r in rows))

  # The same counts from that run by name.
  (row,) = csv.DictReader((tmp_path / "two" / "summary.csv").open())
  (expected,) = [r for r in rows if r["arm"] == "softmax+shadow_time" and r["once_per"] == "node"]
  assert {k: v for k, v in row.items() if k != "arm"} == {k: v for k, v in expected.items() if k != "arm"}
