"""What results say of their models: the width that a token meets, what bounds an expert, what routers are told."""

import dataclasses

import pytest

from moe_jax.config import BlockConfig, MeshConfig, MoEConfig, Segment
from moe_jax.nn.build import resolve
from moe_jax.training.protocol import protocol_of
from tests import own_matrices
from tests.tiny import CONFIG, change

PLAIN = change(
  CONFIG, balancers="none", jitter=0.0
)  # E = 8, K = 2, F = 16, capacity 1.0/2.0, 16 tokens, dense 16


def of(config=PLAIN, **fields):
  config = change(config, **fields)
  return protocol_of(dataclasses.replace(config, model=resolve(config.model)))


@pytest.mark.parametrize(
  ("fields", "width"),
  [
    ({}, 2 * 16),
    ({"num_shared_experts": 3}, 2 * 16 + 3 * 16),
    ({"num_experts_per_token": 4, "router": "top_p"}, 4 * 16),  # at most
    ({"router": "expert_threshold:most=5", "balancers": "expert_threshold"}, 5 * 16),
    ({"router": "remoe", "balancers": "remoe_loss"}, 8 * 16),
    ({"num_experts_per_token": 1, "expert_dim": 32, "num_experts": 1}, 32),  # dense, of equal active width
    ({"ffn": "mlp", "dense_dim": 48}, 48),
    ({"ffn": "parallel_moe", "dense_dim": 24}, 2 * 16 + 24),
    ({"num_dense_first": 1, "dense_dim": 64}, [2 * 16, 64]),
    ({"ffn": "soft_moe:slots=3", "accept_leaks": "soft_moe"}, 8 * 3 * 16 // 16),
    ({"ffn": "default_moe", "router": "softmax_topk:softmax=before"}, 2 * 16),
    ({"ffn": "erc_moe"}, 2 * 16),
    ({"ffn": "latent_moe"}, 16),  # experts read half of D = 16
    ({"ffn": "latent_moe:latent_dim=4", "num_shared_experts": 1}, 8 + 16),  # shared experts read all of D
    ({"ffn": "latent_moe", "num_experts_per_token": 4}, 2 * 16),  # twice as many experts of half the size
    ({"experts": "low_rank:rank=2"}, 2 * 16),
    ({"experts": "expert_dropout:rate=0.1"}, 2 * 16),
  ],
  ids=str,
)
def test_active_width(fields, width):
  assert of(**fields)["active_width"] == width


MATRIX = 16 * 16  # D x F


@pytest.mark.parametrize(
  ("fields", "work"),
  [
    ({}, 2 * 2 * 3 * MATRIX),  # layers, K, gate and up and down
    ({"num_layers": 4}, 4 * 2 * 3 * MATRIX),
    ({"experts": "relu"}, 2 * 2 * 2 * MATRIX),
    ({"num_layers": 4, "num_dense_first": 1, "dense_dim": 64}, (3 * 2 + 4) * 3 * MATRIX),
    ({"num_layers": 4, "num_dense_first": 2, "dense_dim": 64}, (2 * 2 + 2 * 4) * 3 * MATRIX),
    ({"num_experts_per_token": 4, "router": "top_p"}, 2 * 4 * 3 * MATRIX),
    ({"num_shared_experts": 1, "shared_expert_dim": 48}, 2 * (2 + 3) * 3 * MATRIX),
    ({"num_shared_experts": 1, "shared_expert_gate": True}, 2 * 3 * 3 * MATRIX),
    ({"ffn": "latent_moe"}, 2 * 3 * MATRIX),  # without the projections
    ({"ffn": "soft_moe:slots=3", "accept_leaks": "soft_moe"}, 2 * 8 * 3 * 3 * MATRIX / 16),
    (
      {"experts": "low_rank:rank=2", "num_shared_experts": 1, "shared_experts": "low_rank"},
      2 * 3 * 3 * MATRIX,
    ),
    ({"experts": "quantised:format=int4"}, 2 * 2 * 3 * MATRIX),
    ({"experts": "expert_dropout:experts=clipped_swiglu"}, 2 * 2 * 3 * MATRIX),
  ],
  ids=str,
)
def test_work_of_a_token(fields, work):
  assert of(**fields)["ffn_work"] == work


OWN = 2 * 2 * 16 * 32  # layers, matrices, D x hidden


@pytest.mark.parametrize(
  ("fields", "work", "width"),
  [
    ({"ffn": own_matrices.Flat}, OWN, None),
    ({"ffn": own_matrices.Heads}, OWN, None),
    ({"ffn": own_matrices.Unrouted}, None, None),
    ({"ffn": own_matrices.Beside}, OWN + 2 * 2 * 3 * MATRIX, None),
    ({"ffn": own_matrices.Heads, "num_dense_first": 1, "dense_dim": 64}, OWN // 2 + 4 * 3 * MATRIX, None),
    ({"experts": own_matrices.HeadExperts}, 2 * 2 * 2 * MATRIX, 2 * 16),
    ({"router": own_matrices.Transposed}, 2 * 2 * 3 * MATRIX, 2 * 16),
  ],
)
def test_work_of_own_parts_is_counted_or_not_known(fields, work, width):
  found = of(**fields)
  assert (found["ffn_work"], found["active_width"]) == (work, width)


@pytest.mark.parametrize(
  ("fields", "bound"),
  [
    ({}, 8 / 2),
    ({"num_experts_per_token": 1, "expert_dim": 32}, 8),  # of one active width with the first
    ({"ffn": "latent_moe", "num_experts": 12}, 12 / 2),
    ({"router": "moe_plus_plus", "balancers": "heterogeneous_loss"}, 12 / 2),  # 4 have no work
    # all tokens may be sent to one expert alone
    ({"router": "top_p"}, 8),
    ({"router": "remoe", "balancers": "remoe_loss"}, 8),
    ({"router": "expert_threshold", "balancers": "expert_threshold"}, 8),
    ({"router": "token_rounding", "accept_leaks": "token_rounding"}, 8),
    ({"router": "merged_topk:logits=16"}, 8),
    ({"router": "merged_topk"}, 8 / 2),
    ({"router": "gshard_top2", "accept_leaks": "gshard_top2"}, 8 / 2),  # in evaluation, both are sent
    (
      {"ffn": "soft_moe:slots=3", "accept_leaks": "soft_moe"},
      8,
    ),  # what tokens weigh may all be of one expert
    ({"ffn": "mlp"}, None),
  ],
  ids=str,
)
def test_range_of_max_vio(fields, bound):
  assert of(**fields)["max_vio_range"] == bound


CAPACITY = "capacity 1/2 per group of 8"
OF_MESHES = [  # a batch of 8 sequences of 2 groups; 8 devices
  ("all_to_all:capacity=device", {"data": -1}, {}, f"{CAPACITY} (device: 2 groups)"),
  ("all_to_all:capacity=device", {"data": 2, "expert": 2}, {}, f"{CAPACITY} (device: 4 groups)"),
  ("all_gather:capacity=global", {"data": 2, "expert": 2}, {}, f"{CAPACITY} (global: 8 groups)"),
  ("all_gather:capacity=global", {"data": 2, "expert": 4}, {}, f"{CAPACITY} (global: 8 groups)"),
  ("all_gather:capacity=global", {"data": 2}, {"accumulation": 2}, f"{CAPACITY} (global: 4 groups)"),
  (
    "dropless:buffer_factor=1.5",
    {"data": 1, "fsdp": 2, "expert": 2},
    {},
    "device buffers of 1.5 (4 groups, 2 devices)",
  ),
  ("dropless:buffer_factor=1.5", {"data": 4}, {}, "device buffers of 1.5 (1 device)"),
  ("all_to_all", {"data": 4}, {}, CAPACITY),
]


@pytest.mark.parametrize(
  ("fields", "slots"),
  [
    ({}, "capacity 1/2 per group of 16"),
    ({"dispatcher": "einsum"}, "capacity 1/2 per group of 16"),
    ({"dispatcher": "all_to_all"}, "capacity 1/2 per group of 16"),
    ({"dispatcher": "all_to_all:capacity=device"}, "capacity 1/2 per group of 16 (device: 8 groups)"),
    (
      {"dispatcher": "all_to_all:buffer_factor=1.5"},
      "capacity 1/2 per group of 16, device buffers of 1.5 (1 device)",
    ),
    ({"dispatcher": "dropless"}, "dropless"),
    ({"dispatcher": "dropless:buffer_factor=1.5"}, "device buffers of 1.5 (1 device)"),
    ({"dispatcher": "all_gather"}, "dropless"),
    *(
      ({"dispatcher": dispatcher, "mesh": MeshConfig(**mesh), "group_size": 8} | more, slots)
      for dispatcher, mesh, more, slots in OF_MESHES
    ),
    ({"capacity_factor": 1.25, "group_size": 32}, "capacity 1.25/2 per group of 32"),
    ({"capacity_factor": 4.0, "eval_capacity_factor": 4.0}, "dropless"),  # E/K: a slot for every token
    ({"capacity_factor": 3.9, "eval_capacity_factor": 3.75}, "capacity 3.9/3.75 per group of 16"),
    ({"num_experts": 1, "num_experts_per_token": 1}, "dropless"),
    ({"ffn": "mlp"}, "dropless"),
  ],
  ids=str,
)
def test_slots(fields, slots):
  assert of(**fields)["slots"] == slots


def test_inputs_are_what_a_language_model_is_not_told():
  assert [of(router=router)["inputs"] for router in ("softmax_topk", "hash_topk", "task_level")] == [
    "",
    "",
    "domain",
  ]


def test_sizes_of_the_model():
  sizes = {
    "num_layers": 2,
    "model_dim": 16,
    "num_experts": [8],
    "num_experts_per_token": [2],
    "expert_dim": [16],
  }
  assert of()["model"] == sizes
  assert of(ffn="soft_moe", accept_leaks="soft_moe")["model"] == sizes
  assert of(ffn="mlp")["model"]["num_experts"] == []
  wide = BlockConfig(moe=MoEConfig(num_experts=4, expert_dim=64, dispatcher="dropless"))
  model = dataclasses.replace(PLAIN.model, num_layers=4, segments=(Segment((BlockConfig(), wide), 3),))
  model = dataclasses.replace(model, num_layers=type(model).num_layers)
  mixed = protocol_of(dataclasses.replace(PLAIN, model=resolve(model)))
  assert mixed["model"] | {"num_layers": 6, "num_experts": [4, 8], "expert_dim": [16, 64]} == mixed["model"]
  assert (mixed["active_width"], mixed["slots"]) == ([32, 128], "capacity 1/2 per group of 16; dropless")
  assert mixed["max_vio_range"] == [2, 4]
