"""How arrays are laid out on a mesh, and which collectives the compiled MoE layer has."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
from moe_jax.nn import Context, MoE
from moe_jax.training.compiled import make_init, resolve_config
from tests import tiny
from tests.sharding.cases import collectives

# B*L = 8*32 tokens in 8 groups; no other tensor of the layer has a dimension of these sizes by accident.
BATCH, LENGTH, DIM, EXPERTS, HIDDEN = 8, 32, 24, 4, 40


@pytest.mark.parametrize(
  ("logical", "expected"),
  [
    (("batch", None, None), PartitionSpec(("slice", "data", "fsdp", "expert"), None, None)),
    (("expert", "embed", "mlp"), PartitionSpec("expert", "fsdp", "tensor")),
    (("expert", "group", None, None), PartitionSpec("expert", ("slice", "data", "fsdp"), None, None)),
    (("layers", "expert", "mlp", "embed"), PartitionSpec(None, "expert", "tensor", "fsdp")),
    (("embed", "heads", "head_dim"), PartitionSpec("fsdp", "tensor", None)),
    (("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
    (("norm",), PartitionSpec(None)),
  ],
)
def test_partition_spec(logical, expected):
  assert sharding.partition_spec(logical) == expected


@pytest.mark.parametrize(
  ("logical", "shape", "expected"),
  [
    (("vocab", "embed"), (32, 8), PartitionSpec("tensor", "fsdp")),
    (("vocab", "embed"), (31, 8), PartitionSpec(None, "fsdp")),
    (("embed", "kv_heads", "head_dim"), (8, 2, 4), PartitionSpec("fsdp", None, None)),
    (("embed", "kv_heads", "head_dim"), (8, 4, 4), PartitionSpec("fsdp", "tensor", None)),
    (("expert", "mlp_block", "embed"), (8, 2, 8), PartitionSpec("expert", None, "fsdp")),
    (("expert", "embed_block", "mlp_block"), (8, 3, 4), PartitionSpec("expert", None, "tensor")),
  ],
)
def test_some_axes_are_whole_where_they_do_not_fit(logical, shape, expected):
  assert sharding.partition_spec(logical, shape, {"fsdp": 2, "expert": 1, "tensor": 4}) == expected


@pytest.mark.parametrize(
  ("logical", "shape", "sizes", "expected"),
  [
    (("embed", "heads"), (24, 4), {"fsdp": 2, "expert": 4}, PartitionSpec(("fsdp", "expert"), "tensor")),
    (
      ("embed", "heads"),
      (20, 4),
      {"fsdp": 2, "expert": 4},
      PartitionSpec("fsdp", "tensor"),
    ),  # 8 does not divide it
    (
      ("embed", "heads"),
      (24, 4),
      {"fsdp": 1, "expert": 4},
      PartitionSpec("fsdp", "tensor"),
    ),  # nothing is gathered
    (("attention_rank",), (8,), {"fsdp": 2, "expert": 4}, PartitionSpec(("fsdp", "expert"))),
    (("attention_rank",), (6,), {"fsdp": 2, "expert": 4}, PartitionSpec("fsdp")),
    (("embed", "attention_rank"), (8, 8), {"fsdp": 2, "expert": 4}, PartitionSpec(("fsdp", "expert"), None)),
    (("expert", "embed"), (4, 8), {"fsdp": 2, "expert": 4}, PartitionSpec("expert", "fsdp")),
  ],
)
def test_parameters_that_are_not_of_experts_are_kept_in_parts_over_experts_too(
  logical, shape, sizes, expected
):
  assert sharding.partition_spec(logical, shape, {"tensor": 1} | sizes) == expected


def test_constrain_without_a_mesh_does_nothing():
  x = jnp.ones((3, 2))
  assert sharding.constrain(x, ("batch", None)) is x


def _compiled_layer(dispatcher: str, differentiate: bool) -> str:
  """The compiled layer on data=2 x expert=4, its arguments laid out as in training."""
  fields = {"num_experts": EXPERTS, "expert_dim": HIDDEN, "balancer": "switch_loss:0.01"}
  mesh = sharding.make_mesh(MeshConfig(data=2, expert=4))
  with jax.set_mesh(mesh):
    graphdef, params, rest = nnx.split(
      MoE(DIM, dispatcher=dispatcher, rngs=nnx.Rngs(0), **fields), nnx.Param, ...
    )
    layouts = sharding.state_shardings(mesh, params)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    x_layout = sharding.batch_sharding(mesh)

    forward = lambda params, x_BLD: nnx.merge(graphdef, params, rest)(x_BLD, Context(train=True))[0]
    gradients = lambda params, x_BLD, dy_BLD: jax.vjp(forward, params, x_BLD)[1](dy_BLD)
    x, given = jax.ShapeDtypeStruct((BATCH, LENGTH, DIM), jnp.float32), (layouts, x_layout)
    if differentiate:
      jitted = jax.jit(gradients, in_shardings=(*given, x_layout), out_shardings=given)
      return jitted.lower(params, x, x).compile().as_text()
    jitted = jax.jit(forward, in_shardings=given, out_shardings=x_layout)
    return jitted.lower(params, x).compile().as_text()


@pytest.mark.parametrize("dispatcher", ["einsum", "sorted"])
def test_a_layer_has_two_all_to_alls_forward_and_nothing_else(dispatcher):
  assert collectives(_compiled_layer(dispatcher, differentiate=False)) == {"all-to-all": 2}


def test_einsum_layer_has_four_all_to_alls_with_backward():
  """Two more for the way back; all-reduces sum weight gradients over the replicas."""
  found = collectives(_compiled_layer("einsum", differentiate=True))
  assert found["all-to-all"] == 4
  assert found["all-gather"] == found["collective-permute"] == found["reduce-scatter"] == 0


def test_the_count_can_fail():
  program = (
    "%a = f32[8] all-to-all(%x), y\n%b = (f32[8], f32[8]) all-gather-start(%x)\n%c = f32[8] all-to-all(%x)"
  )
  assert collectives(program) == {"all-to-all": 2, "all-gather": 1}


def _abstract_state():
  return jax.eval_shape(make_init(resolve_config(tiny.CONFIG), tiny.VOCAB), 0)


def test_optimizer_state_is_laid_out_like_its_parameters():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  state = _abstract_state()
  layouts = sharding.state_shardings(mesh, state)
  adam = layouts.opt_state.inner_states["trained"].inner_state[1][0]
  assert jax.tree.leaves(layouts.params) == jax.tree.leaves(adam.mu) == jax.tree.leaves(adam.nu)
  into = NamedSharding(mesh, PartitionSpec(None, "expert", "fsdp", "tensor"))
  out = NamedSharding(mesh, PartitionSpec(None, "expert", "tensor", "fsdp"))
  assert jax.tree.leaves(layouts.params).count(into) == 2  # gate, up
  assert jax.tree.leaves(layouts.params).count(out) == 1  # down
  assert len(jax.tree.leaves(layouts)) == len(jax.tree.leaves(state))
  # Of two layers with 8 experts of 16 x 16, one device holds an eighth of each moment.
  for moments in (adam.mu, adam.nu):
    w_up = moments["segments"][0]["pattern"]["blocks"][0]["ffn"]["experts"]["w_up_EDF"]
    assert w_up.get_value().shard_shape((2, 8, 16, 16)) == (2, 4, 8, 8)


def test_every_parameter_names_its_axes():
  state = _abstract_state()
  for path, variable in nnx.to_flat_state(state.params):
    axes = variable.get_metadata()["logical_axes"]
    assert variable.get_value().ndim - len(axes) == ("segments" in path), path


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (MeshConfig(data=3, expert=4), "--data_parallelism=3, --expert_parallelism=4: .* 8 devices"),
    (MeshConfig(data=-1, expert=3), "--expert_parallelism=3: .* 8 devices"),
    (MeshConfig(data=-1, expert=-1), "at most one axis can be -1"),
    (MeshConfig(data=16, expert=1), "8 devices"),
    (MeshConfig(data=1, fsdp=2, tensor=5), "--fsdp_parallelism=2, --tensor_parallelism=5: .* 8 devices"),
    (MeshConfig(data=1, slice=16), "--slice_parallelism=16: .* 8 devices"),
    (MeshConfig(data=0), "--data_parallelism=0: must be positive or -1"),
    (MeshConfig(data=1, expert=-2), "--expert_parallelism=-2: must be positive or -1"),
  ],
)
def test_a_mesh_that_does_not_fit(config, message):
  with pytest.raises(InputError, match=message):
    sharding.make_mesh(config)


def test_a_mesh_of_given_devices():
  """As the compiler for a topology wants it: these devices, all of them, in the order of the axes."""
  devices = jax.devices()[2:6]
  mesh = sharding.make_mesh(MeshConfig(slice=2, data=1, tensor=-1), devices)
  assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 1, "expert": 1, "tensor": 2}
  assert mesh.devices.flatten().tolist() == devices
  with pytest.raises(InputError, match=r"--data_parallelism=2: .* 4 devices"):
    sharding.make_mesh(MeshConfig(data=2), devices)


@pytest.mark.parametrize(
  ("mesh", "fields", "sizes", "message"),
  [
    ({"data": 2, "expert": 4}, {}, (12, 8), r"--batch_size.*12 sequences.*8 devices.*data=2 x expert=4"),
    ({"data": 2, "expert": 4}, {}, (8, 4), "--group_size.*4 routing groups.*8 devices"),
    ({"slice": 2, "tensor": 2}, {"num_heads": 2}, (3, 8), "--batch_size.*3 sequences.*2 devices.*slice=2"),
    ({"data": 2, "expert": 4}, {"num_experts": 6}, (8, 8), "--num_experts=6.*--expert_parallelism=4"),
    ({"fsdp": 8}, {"model_dim": 20}, (8, 8), "--model_dim=20.*--fsdp_parallelism=8"),
    ({"tensor": 4}, {"num_heads": 2}, (8, 8), "--num_heads=2.*--tensor_parallelism=4"),
    ({"tensor": 2}, {"expert_dim": 15}, (8, 8), "--expert_dim=15.*--tensor_parallelism=2"),
    ({"tensor": 2}, {"dense_dim": 15, "moe_every": 2}, (8, 8), "--dense_dim=15.*--tensor_parallelism=2"),
    ({"tensor": 2}, {"dense_dim": 15}, (8, 8), None),  # no layer has it
    ({"fsdp": 2, "expert": 2, "tensor": 2}, {}, (8, 8), None),
  ],
)
def test_what_the_mesh_does_not_divide(mesh, fields, sizes, message):
  mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | mesh))
  model = tiny.change(tiny.CONFIG, **fields).model
  micro_batch, num_groups = sizes
  if message is None:
    return sharding.check_divides(mesh, model, micro_batch=micro_batch, num_groups=num_groups)
  with pytest.raises(InputError, match=message) as error:
    sharding.check_divides(mesh, model, micro_batch=micro_batch, num_groups=num_groups)
  assert "\n" not in str(error.value)
