"""The laws table of routers: one row per method and option that changes what it computes."""

from functools import partial

from tests.ops.router_row import (
  Row,
  four_sequences,
  further_logits,
  normals,
  twenty_ids,
  uniform_per_further_choice,
  uniform_per_token,
)
from tests.reference import batch_routing as batch
from tests.reference import limited_routing as limited
from tests.reference import noisy_routing as noisy
from tests.reference import relu_routing as relu
from tests.reference import routing as reference
from tests.reference import table_routing as table
from tests.reference import variable_routing as variable

# What the rows of a family have in common.
own = partial(Row, own_weights=True)
leaky_drops = partial(Row, leaks="drops")
noise = partial(Row, draws_per_expert=True, exact_ties=False)  # noise breaks ties
grouped = partial(Row, permutable=False)  # experts have an order or groups
by_table = partial(grouped, context=twenty_ids, takes_bias=False)
prioritized = partial(own, leaks="drops", exact_ties=False)
whole_group = partial(Row, leaks="always", takes_bias=False)
untied = partial(whole_group, exact_ties=False)
rounding = partial(Row, leaks="always", bias_decides=False, exact_ties=False)
threshold = partial(own, shift_matters=True)

ROWS = {
  "softmax_topk": Row("softmax_topk", 6, 2, reference.softmax_topk),
  "softmax_before": own("softmax_topk:softmax=before", 6, 3, reference.softmax_before_topk),
  "every_expert": own("softmax_topk:before", 3, 3, reference.softmax_before_topk),
  "sigmoid_topk": own("sigmoid_topk", 6, 2, reference.sigmoid_topk, reference.sigmoid),
  "deepseek_v3": Row("sigmoid_topk:normalize=true:scale=2.5", 6, 2, reference.deepseek_v3, reference.sigmoid),
  "llama4_topk": own("llama4_topk", 6, 2, reference.llama4_topk, reference.sigmoid),
  "switch_top1": own("switch_top1", 6, 1, reference.softmax_before_topk),
  "gshard_top2": leaky_drops("gshard_top2", 6, 2, reference.gshard_top2, draw=uniform_per_token),
  "gshard_mesh": leaky_drops(
    "gshard_top2:threshold=0.2:slots=sent", 6, 2, variable.mesh_top2, draw=uniform_per_token
  ),
  "noisy_topk": noise("noisy_topk", 6, 2, noisy.noisy_topk, draw=normals(6), more_logits=further_logits(6)),
  "vmoe_topk": noise("vmoe_topk", 6, 2, noisy.vmoe_topk, draw=normals(6), own_weights=True),
  "hierarchical_topk": grouped(
    "hierarchical_topk:groups=3:groups_per_token=2",
    9,
    4,
    partial(noisy.hierarchical_topk, groups_per_token=2),
    score=None,  # of the logits of the groups too
    draw=normals(3, 9),
    draws_per_expert=True,
    more_logits=further_logits(3, 9, 3),
    bias_decides=False,
    exact_ties=False,
  ),
  "hierarchical_without_noise": grouped(
    "hierarchical_topk:2:1:none",
    6,
    2,
    partial(noisy.hierarchical_topk, groups_per_token=1),
    score=None,
    more_logits=further_logits(2),
    bias_decides=False,
  ),
  "st_moe_topn": leaky_drops("st_moe_topn", 6, 3, variable.st_moe_topn, draw=uniform_per_further_choice),
  "st_moe_top1": Row("st_moe_topn", 6, 1, reference.softmax_topk, differentiable=False),
  "top_p": own("top_p", 6, 3, variable.top_p(0.4)),
  # K = E without taking every expert, which the law of the bias does not expect of other routers
  "top_p_unlimited": Row("top_p:0.8", 4, 4, variable.top_p(0.8), bias_decides=False),
  "expert_threshold": threshold("expert_threshold", 6, 1, variable.expert_threshold(4), reference.sigmoid),
  "expert_threshold_cut": threshold(
    "expert_threshold:most=2", 6, 1, variable.expert_threshold(2), reference.sigmoid
  ),
  "remoe": own("remoe", 6, 2, relu.remoe, relu.relu, takes_bias=False),
  "remoe_limited": own(
    "remoe:max_experts=3", 6, 2, partial(relu.remoe, limit=3), relu.relu, takes_bias=False
  ),
  "task_level": Row("task_level:3", 6, 2, reference.softmax_topk),
  "sequence_level": Row(
    "sequence_level", 6, 2, variable.sequence_level, score=None, leaks="always", context=four_sequences
  ),
  "moe_plus_plus": own("moe_plus_plus", 4, 3, variable.moe_plus_plus(4, 1), zero_computation=4),
  "moe_plus_plus_normalized": grouped(  # the weights next to a zero expert are others
    "moe_plus_plus:zeros=2:constants=1:normalize=true",
    4,
    3,
    variable.moe_plus_plus(4, 2, normalize=True),
    zero_computation=4,
  ),
  "longcat_topk": own("longcat_topk:identities=2:scale=1", 4, 3, variable.longcat(1), zero_computation=2),
  "longcat_scaled": Row("longcat_topk:identities=1", 5, 2, variable.longcat(6), zero_computation=1),
  "sqrt_softplus_topk": Row("sqrt_softplus_topk", 6, 2, limited.sqrt_softplus_topk, limited.sqrt_softplus),
  "sqrt_softplus_plain": own(
    "sqrt_softplus_topk:normalize=false",
    6,
    3,
    partial(limited.sqrt_softplus_topk, normalize=False),
    limited.sqrt_softplus,
  ),
  "group_limited_topk": own(
    "group_limited_topk:groups=2:groups_per_token=1:group_top=3:score=sqrt_softplus:normalize=false",
    8,
    3,
    partial(limited.group_limited, groups=2, groups_per_token=1, group_top=3, score="sqrt_softplus"),
    limited.sqrt_softplus,
    permutable=False,
  ),
  "device_limited_topk": own(
    "device_limited_topk:groups=4:groups_per_token=2:scale=1",
    8,
    3,
    partial(limited.group_limited, groups=4, groups_per_token=2, group_top=1, score="softmax"),
    permutable=False,
  ),
  "node_limited_topk": grouped(
    "node_limited_topk:groups=3:groups_per_token=2",
    6,
    2,
    partial(
      limited.group_limited,
      groups=3,
      groups_per_token=2,
      group_top=2,
      score="sigmoid",
      normalize=True,
      scale=2.5,
    ),
    reference.sigmoid,
  ),
  "grouped_topk": own(
    "grouped_topk:groups=2", 8, 4, partial(limited.grouped_topk, groups=2), permutable=False
  ),
  "grouped_topk_one_of_each": grouped(
    "grouped_topk:normalize=true", 6, 3, partial(limited.grouped_topk, groups=3, normalize=True)
  ),
  "topology_aware_topk": grouped(
    "topology_aware_topk:max_remote_fraction=0.4",
    6,
    2,
    partial(limited.topology_aware, nodes=2, fraction=0.4),
    leaks="always",
    bias_decides=False,
  ),
  "topology_local": grouped(
    "topology_aware_topk:nodes=3:max_remote_fraction=0",
    6,
    2,
    partial(limited.topology_aware, nodes=3, fraction=0.0),
    bias_decides=False,
  ),
  "hash_topk": by_table(
    "hash_topk:seed=3:vocab_size=16",
    6,
    3,
    partial(table.hash_topk, seed=3, vocab_size=16),
    table.uniform,
    differentiable=False,
  ),
  "frozen_table_topk": by_table(
    "frozen_table_topk:vocab_size=16:scale=1.5",
    6,
    2,
    partial(table.frozen_table_topk, seed=0, vocab_size=16, score="sqrt_softplus", normalize=True, scale=1.5),
    limited.sqrt_softplus,
  ),
  "batch_prioritized": prioritized("batch_prioritized", 6, 2, batch.batch_prioritized),
  "batch_prioritized_sum": prioritized(
    "batch_prioritized:priority=sum", 6, 3, partial(batch.batch_prioritized, priority="sum")
  ),
  "expert_choice": untied("expert_choice", 6, 2, batch.expert_choice),
  "expert_choice_uneven": untied("expert_choice", 5, 2, batch.expert_choice),
  "token_rounding": rounding("token_rounding:tile=4", 6, 2, partial(batch.token_rounding, tile=4)),
  "token_rounding_up": rounding(
    "token_rounding:tile=5:to=up", 5, 2, partial(batch.token_rounding, tile=5, to="up")
  ),
  "token_rounding_down": rounding(
    "token_rounding:tile=3:to=down", 6, 3, partial(batch.token_rounding, tile=3, to="down")
  ),
  "base_assignment": untied("base_assignment", 6, 1, batch.base_assignment, reference.sigmoid, train=True),
  "base_assignment_evaluation": whole_group(
    "base_assignment", 6, 1, partial(batch.base_assignment, train=False), reference.sigmoid, leak_found=""
  ),
  "sinkhorn": untied("sinkhorn", 6, 2, batch.sinkhorn, train=True),
  "sinkhorn_top1": untied("sinkhorn", 6, 1, batch.sinkhorn_sigmoid, reference.sigmoid, train=True),
  "sinkhorn_evaluation": whole_group(
    "sinkhorn:score=sigmoid",
    6,
    2,
    partial(batch.sinkhorn_sigmoid, train=False),
    reference.sigmoid,
    leak_found="",
  ),
  "quantile_topk": untied("quantile_topk", 6, 2, batch.quantile_topk, reference.sigmoid),
  "quantile_topk_softmax": untied(
    "quantile_topk:softmax:rounds=3:strength=0.5", 6, 2, batch.quantile_topk_softmax
  ),
}
