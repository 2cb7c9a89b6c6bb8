"""Wrong settings of routers and balancers: one line each, which says what would be right."""

import pytest

from moe_jax.errors import InputError
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.routing import make_choice

# (number of experts, K) -> {router: what the line says}
ROUTERS = {
  (6, 2): {
    "switch_top1": "num_experts_per_token=2: router switch_top1 takes 1",
    "gshard_top2:0": "threshold must be in (0, 1], got 0.0",
    "gshard_top2:1.5": "threshold must be in (0, 1], got 1.5",
    "softmax_topk:during": "softmax must be one of before, after, got 'during'",
    "softmax_top": "unknown router 'softmax_top': did you mean softmax_topk",
    "sigmoid_topk:normalize=1": "normalize must be true or false, got '1'",
    "token_rounding:tile=0": "tile must be at least 1, got 0",
    "token_rounding:to=half": "to must be one of nearest, up, down, got 'half'",
    "batch_prioritized:mean": "priority must be one of max, sum, got 'mean'",
    "base_assignment": "num_experts_per_token=2: router base_assignment takes 1",
    "sinkhorn:relu": "score must be one of auto, sigmoid, softmax, got 'relu'",
    "sinkhorn:tolerance=0": "tolerance must be above 0, got 0.0",
    "sinkhorn:max_iterations=0": "max_iterations must be at least 1, got 0",
    "quantile_topk:relu": "score must be one of sigmoid, softmax, got 'relu'",
    "quantile_topk:rounds=0": "rounds must be at least 1, got 0",
    "quantile_topk:strength=1.5": "strength must be in [0, 1], got 1.5",
    "noisy_topk:min_std=0": "min_std must be above 0, got 0.0",
    "vmoe_topk:0": "noise must be above 0, got 0.0; without any it is softmax_topk:before",
    "gshard_top2:slots=some": "slots must be one of all, sent, got 'some'",
    "st_moe_topn:0": "threshold must be in (0, 1], got 0.0",
    "top_p:1": "p must be in (0, 1), got 1.0",
    "task_level:0": "tasks must be at least 1, got 0",
    "moe_plus_plus:zeros=-1": "zeros=-1, copies=1, constants=2 must be 0 or more",
    "moe_plus_plus:0:0:0": "and not all 0",
    "topology_aware_topk:2:-0.1": "max_remote_fraction must be in [0, 1], got -0.1",
    "topology_aware_topk:2:1.5": "max_remote_fraction must be in [0, 1], got 1.5",
    "hash_topk:modulo": "kind must be one of random, even, got 'modulo'",
    "hash_topk:vocab_size=0": "vocab_size=0 must be at least 1",
    "frozen_table_topk:seed=-1": "seed=-1 must be in [0, 2^32)",
    "frozen_table_topk:score=relu": "score must be one of softmax, sigmoid, sqrt_softplus, got 'relu'",
  },
  (6, 1): {
    "gshard_top2": "num_experts_per_token=1: router gshard_top2 takes 2",
    "topology_aware_topk:4": "nodes=4 must divide num_experts=6",
    "topology_aware_topk:0": "nodes=0 must divide num_experts=6",
  },
  (8, 2): {
    "hierarchical_topk:3": "groups must divide num_experts=8, got 3",
    "hierarchical_topk:0": "groups must divide num_experts=8, got 0",
    "hierarchical_topk:4:5": "groups_per_token must be in [1, groups=4], got 5",
    "hierarchical_topk:4:0": "groups_per_token must be in [1, groups=4], got 0",
    "hierarchical_topk:4:2:some": "noise must be one of learned, none, got 'some'",
    "hierarchical_topk:4:2:min_std=0": "min_std must be above 0, got 0.0",
  },
  (8, 3): {
    "hierarchical_topk:4:2": "groups_per_token must divide num_experts_per_token=3, got 2",
  },
  (8, 4): {
    "hierarchical_topk:4:1": "takes 4 experts in each of 1 groups, and a group has 2",
  },
  (6, 3): {
    "node_limited_topk:groups=4": "groups=4 must divide num_experts=6",
    "group_limited_topk:groups=0": "groups=0 must divide num_experts=6",
    "group_limited_topk:3:4": "groups_per_token=4 must be between 1 and groups=3",
    "group_limited_topk:3:0": "groups_per_token=0 must be between 1 and groups=3",
    "device_limited_topk:6:2": "2 groups of 1 experts per token are fewer than num_experts_per_token=3",
    "node_limited_topk:6:3": "group_top=2 must be between 1 and the 1 experts of a group",
    "group_limited_topk:2:1:0": "group_top=0 must be between 1 and the 3 experts",
    "grouped_topk:groups=4": "groups=4 must divide num_experts=6",
    "grouped_topk:groups=2": "groups=2 must divide num_experts_per_token=3",
    "group_limited_topk:2:1:score=tanh": "score must be one of softmax, sigmoid, sqrt_softplus, got 'tanh'",
    "topology_aware_topk:3": "the 2 experts of a node (num_experts=6, nodes=3) are fewer than",
  },
}

# number of experts, or None where the construction of the balancer says it -> {balancer: what the line says}
BALANCERS = {
  8: {
    "heterogeneous_loss:zero_computation=8": "zero_computation=8 leaves no feed-forward expert among the 8",
  },
  None: {
    "heterogeneous_loss:tau=0": "tau above 0, got 4 and 0.0",
    "device_loss:devices=0": "device_loss: devices must be 1 or more, got 0",
    "communication_loss:devices=2": "devices_per_token must be in [1, devices=2], got 3",
    "communication_loss:devices_per_token=0": "devices_per_token must be in [1, devices=8], got 0",
    "device_loss:scope=device": "scope must be one of sequence, group, micro_batch, buffer, global_batch",
    "loss_free_bias:-0.1": "rate must be 0 or more, got -0.1",
    "switch_loss:0.1:layer": "scope must be one of sequence, group, micro_batch, buffer, global_batch, got 'layer'",
    "z_loss:0.1,swich_loss": "unknown balancer 'swich_loss': did you mean switch_loss",
    "none:1": "takes 0 values: none",
    "multiplicative_bias:-1": "balancer multiplicative_bias: rate must be 0 or more, got -1.0",
    "loss_free_bias:rule=clip": "rule must be one of sign, proportional, rms, got 'clip'",
    "loss_free_bias:schedule=step": "schedule must be one of constant, stop, linear, cosine, got 'step'",
    "loss_free_bias:schedule=stop": "schedule=stop needs steps of 1 or more, got 0",
    "loss_free_bias:steps=9": "steps=9 needs schedule=stop, linear, cosine, got constant",
    "quantile_balancing:ema=1": "ema must be in [0, 1), got 1.0",
    "quantile_balancing:bins=0": "bins must be 1 or more, got 0",
    "quantile_balancing:reach=0": "reach must be above 0, got 0.0",
    "quantile_balancing:cutoff=last": "cutoff must be one of next, quantile, got 'last'",
    "adaptive_loss:min_ratio=0.2": "min_ratio must be in [0, max_ratio=0.01], got 0.2",
    "adaptive_loss:rate=-1": "rate must be 0 or more, got -1.0",
    "adaptive_loss:average=0": "average must be in (0, 1], got 0.0",
    "adaptive_loss:capacity_factor=0": "capacity_factor must be above 0, got 0.0",
    "adaptive_loss:limit=0.5": "limit must be 1 or more, got 0.5",
    "importance_loss:1:layer": "balancer importance_loss: scope must be one of",
    "importance_loss:1:group:counts": "of must be one of weights, scores, got 'counts'",
    "load_loss:1:layer": "balancer load_loss: scope must be one of",
    "squared_deviation_loss:of=counts": "of must be one of load, importance, got 'counts'",
    "squared_deviation_loss:of=load:scope=step": "scope must be one of sequence, group, micro_batch",
  },
  4: {
    "device_loss:devices=3": "device_loss: devices must divide the number of experts 4, got 3",
    "communication_loss": "communication_loss: devices must divide the number of experts 4, got 8",
  },
}


def rows_of(table):
  return [(sizes, spec, message) for sizes, of_size in table.items() for spec, message in of_size.items()]


@pytest.mark.parametrize(("sizes", "spec", "message"), rows_of(ROUTERS))
def test_routers(sizes, spec, message):
  with pytest.raises(InputError) as error:
    make_choice(spec, *sizes)
  assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("num_experts", "spec", "message"), rows_of(BALANCERS))
def test_balancers(num_experts, spec, message):
  balancer = make_balancer(spec) if num_experts else None
  with pytest.raises(InputError) as error:
    balancer.init(num_experts) if balancer else make_balancer(spec)
  assert message in str(error.value) and "\n" not in str(error.value)
