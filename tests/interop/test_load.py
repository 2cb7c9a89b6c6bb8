"""Loading: what was saved comes back, on one device and on a mesh, and no byte is read that is not needed."""

import dataclasses
import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.data.bpe import train_bpe
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.interop import place
from moe_jax.interop.families import FAMILIES
from moe_jax.interop.folder import open_folder, read_config
from moe_jax.interop.layout import Layout
from moe_jax.interop.load import load_model
from moe_jax.interop.names import Piece, Stored
from moe_jax.interop.place import fill
from moe_jax.interop.quantised import MXFP4
from moe_jax.training.load import Loaded
from moe_jax.training.start import save_model
from tests.interop.helpers import MIXTRAL, V, assert_same_model, random_model, traced_memory


@pytest.fixture(scope="module")
def model():
  return random_model(MIXTRAL)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("mixtral")
  moe_jax.save(model, folder)
  return folder


class Counting:
  """A tensor that notes how many bytes were read of it, and the most in one read."""

  def __init__(self, tensor):
    self.tensor, self.shape, self.dtype, self.read, self.most = tensor, tensor.shape, tensor.dtype, 0, 0

  def __getitem__(self, slices):
    values = self.tensor[slices]
    self.read += values.nbytes
    self.most = max(self.most, values.nbytes)
    return values


def counted(folder):
  """The opened folder with counting tensors."""
  opened = open_folder(pathlib.Path(folder), read_config(folder / "config.json"))
  return opened._replace(tensors={name: Counting(x) for name, x in opened.tensors.items()})


def test_what_was_saved_comes_back(model, folder):
  loaded = moe_jax.load(folder)
  assert_same_model(loaded.model, model)
  assert (loaded.step, loaded.tokenizer, loaded.folder) == (0, None, folder)
  tokens_BL = np.arange(12).reshape(2, 6)
  np.testing.assert_array_equal(loaded.model(tokens_BL)[0], model(tokens_BL)[0])


def test_how_attention_is_computed_does_not_keep_a_model_from_being_saved(tmp_path):
  moe_jax.save(random_model(dataclasses.replace(MIXTRAL, mixer="attention:kernel=blocks")), tmp_path)
  assert moe_jax.load(tmp_path).config.model.model_dim == MIXTRAL.model_dim


def test_several_files_with_an_index(model, folder, tmp_path):
  moe_jax.save(model, tmp_path, shard_bytes=4000)
  names = [path.name for path in sorted(tmp_path.glob("*.safetensors"))]
  assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
  assert_same_model(moe_jax.load(tmp_path).model, model)


def test_tied_embeddings(tmp_path):
  model = random_model(dataclasses.replace(MIXTRAL, tie_embeddings=True))
  moe_jax.save(model, tmp_path)
  assert "lm_head.weight" not in open_folder(tmp_path, {}).tensors
  loaded = moe_jax.load(tmp_path)
  assert loaded.model.w_head_DV is None and loaded.config.model.tie_embeddings
  assert_same_model(loaded.model, model)


def test_bfloat16(model, tmp_path):
  """Written in bfloat16 and loaded in it, or in float32 with the same values. The router stays float32."""
  moe_jax.save(model, tmp_path, dtype="bfloat16")
  half, whole = moe_jax.load(tmp_path, dtype="bfloat16"), moe_jax.load(tmp_path)
  assert half.config.model.compute_dtype == whole.config.model.compute_dtype == "bfloat16"
  params = nnx.to_flat_state(nnx.state(half.model, nnx.Param))
  dtypes = {".".join(map(str, path[-2:])): x.get_value().dtype for path, x in params}
  assert dtypes["experts.w_up_EDF"] == dtypes["mixer.w_out_NHD"] == jnp.bfloat16
  assert dtypes["router.w_router_DE"] == dtypes["norm.scale_D"] == jnp.float32
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.state(model, nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, nnx.state(whole.model, nnx.Param), rounded)
  np.testing.assert_array_equal(half.model(np.arange(6)[None])[0], whole.model(np.arange(6)[None])[0])
  moe_jax.save(whole, tmp_path / "again")  # in the type that it was loaded in
  one, other = (path.joinpath("model.safetensors").read_bytes() for path in (tmp_path, tmp_path / "again"))
  assert one == other


def test_straight_onto_a_mesh(model, folder, tmp_path):
  """Every array lies as the rules say. Each byte of the files is read once, though devices share parts."""
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  with jax.set_mesh(mesh):
    loaded = moe_jax.load(folder)
    opened = counted(folder)
    load_model(FAMILIES["mixtral"], opened, loaded.config, V, "float32")
  state = nnx.state(loaded.model, nnx.Param)
  wanted = sharding.state_shardings(mesh, state)
  jax.tree.map(
    lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim) or pytest.fail(str(sharding)),
    state,
    wanted,
  )
  parts = {str(shard.index) for shard in loaded.model.embedding_VD.get_value().addressable_shards}
  assert len(parts) == 8  # vocabulary over tensor, width over fsdp and expert
  assert_same_model(loaded.model, model)
  for name, tensor in opened.tensors.items():
    assert tensor.read == np.prod(tensor.shape) * 4, name
  moe_jax.save(loaded, tmp_path)  # from where its parts are
  one, other = (path.joinpath("model.safetensors").read_bytes() for path in (folder, tmp_path))
  assert one == other


def test_a_mesh_that_does_not_divide_the_model(folder):
  right = r"--num_experts=4: must be a multiple of --expert_parallelism=8"
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, expert=8))), pytest.raises(InputError, match=right):
    moe_jax.load(folder)


@pytest.mark.parametrize("text", ["F D -> D F", "E (i F) D -> E D F"])
def test_a_process_reads_only_the_bytes_of_its_parts(text):
  """For one device of a mesh that splits experts, rows or columns: the bytes of its part, and no others."""
  packed = text.startswith("E")
  layout = Layout(text, i=(1, 2)) if packed else Layout(text)
  shape = (2, 4, 8, 6)  # R, E, D, F
  file_shape = layout.file_shape(shape[1:] if packed else shape[2:])
  leads = [(r,) for r in range(2)] if packed else [(r, e) for r in range(2) for e in range(4)]
  pieces = tuple(Piece(lead, str(lead), layout) for lead in leads)
  for index in (np.s_[0:2, 1:3, 0:8, 0:6], np.s_[0:1, 0:4, 2:4, 0:6], np.s_[0:2, 0:4, 0:8, 3:6]):
    tensors = {str(lead): Counting(np.random.default_rng(0).normal(size=file_shape)) for lead in leads}
    out = np.full([i.stop - i.start for i in index], np.nan)
    fill(out, Stored(("w",), shape, pieces), index, tensors)
    assert not np.isnan(out).any()
    assert sum(tensor.read for tensor in tensors.values()) == out.nbytes


def test_host_memory_stays_small(tmp_path, monkeypatch):
  """Beyond what stays, loading needs no more than the largest tensor, also where types are changed."""
  moe = dataclasses.replace(MIXTRAL.moe, expert_dim=2048, num_experts=8)
  config = dataclasses.replace(MIXTRAL, model_dim=64, moe=moe)
  moe_jax.save(random_model(config), tmp_path, dtype="bfloat16")
  moe_jax.load(tmp_path)  # what Python and JAX keep
  largest = max(np.prod(x.shape) * 4 for x in counted(tmp_path).tensors.values())
  monkeypatch.setattr(place, "_aligned", traced_memory)
  tracemalloc.start()
  loaded = moe_jax.load(tmp_path)
  stays, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  parameters = sum(x.nbytes for x in jax.tree.leaves(nnx.state(loaded.model)))
  assert parameters > 20 * largest and stays > 0.9 * parameters  # NumPy's memory is what the model uses
  assert peak - stays < largest


def test_packed_experts_are_dequantised_a_few_at_a_time(monkeypatch):
  """In MXFP4 all experts of a layer are one tensor, which in float32 is eight times as large."""
  e, d, f = 32, 64, 64
  blocks = np.random.default_rng(0).integers(0, 256, (e, d, f // 32, 16)).astype(np.uint8)
  tensor = MXFP4(blocks, np.full(blocks.shape[:-1], 127, np.uint8))
  stored = Stored(("w",), (1, e, f, d), (Piece((0,), "w", Layout("E D F -> E F D")),))
  out, index = np.zeros(stored.shape, np.float32), tuple(slice(0, n) for n in stored.shape)
  monkeypatch.setattr(place, "_STEP", 2 * out.nbytes // e)
  tracemalloc.start()
  fill(out, stored, index, {"w": tensor})
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  np.testing.assert_array_equal(out[0], tensor[:, :, :].swapaxes(1, 2))
  assert peak < out.nbytes / 2


def test_a_device_that_is_no_cpu_gets_parameters_in_steps(model, folder, monkeypatch):
  """Layer by layer, and of the embedding several rows at a time."""
  put, sizes = place._put, set()
  monkeypatch.setattr(
    place, "_put", lambda array, part, start: sizes.add(part.shape) or put(array, part, start)
  )
  monkeypatch.setattr(place, "_STEP", 1000)
  monkeypatch.setattr(place, "in_place", lambda device: False)
  assert_same_model(moe_jax.load(folder).model, model)
  assert {(15, 16), (3, 16), (1, 4, 16, 24)} <= sizes  # V = 48 in steps of 15 rows; experts of one layer


def tokenizer(folder, size):
  (folder / "tokenizer.json").write_bytes(train_bpe(["abc abc"], size))


def test_the_tokenizer_of_a_checkpoint(model, tmp_path):
  """It gets no ids that the model does not have."""
  moe_jax.save(random_model(MIXTRAL, vocab_size=260), tmp_path)
  tokenizer(tmp_path, 260)
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
  loaded = moe_jax.load(tmp_path)
  assert loaded.tokenizer.vocab_size == 260 and loaded.stop_ids == (3, 5)
  assert (
    loaded.tokenizer.bos_id is None and loaded.tokenizer.pad_id < 260
  )  # no file says what begins a document
  assert loaded.tokenizer.decode(loaded.tokenizer.encode("abc")) == "abc"
  moe_jax.save(loaded, tmp_path / "again")
  assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
  assert moe_jax.load(tmp_path / "again").stop_ids == (3, 5)
  (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("260", "256"))
  with pytest.raises(
    InputError, match=r"tokenizer.json: has ids up to 257, and the model a vocabulary of 256; use"
  ):
    moe_jax.load(tmp_path)


@pytest.mark.parametrize(
  ("config", "generation", "named", "bos"),
  [(7, None, None, 7), (7, 9, "!", 9), (None, 9, "!", 9), (None, None, "!", 0), (None, None, None, None)],
)
def test_what_begins_a_document_is_what_the_files_say(tmp_path, config, generation, named, bos):
  """The generation's, the configuration's or the tokenizer's own, in this order; never one that no file says."""
  moe_jax.save(random_model(MIXTRAL, vocab_size=260), tmp_path)
  tokenizer(tmp_path, 260)
  values = read_config(tmp_path / "config.json") | {"bos_token_id": config}
  for name, content in (
    ("config", values),
    ("generation_config", {"bos_token_id": generation}),
    ("tokenizer_config", {"bos_token": {"content": named} if named else None}),
  ):
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
  loaded = moe_jax.load(tmp_path)
  assert loaded.tokenizer.bos_id == loaded.tokenizer.ids.bos_id == bos
  run = save_model(tmp_path / "run", loaded.model, loaded.config, loaded.tokenizer)
  assert moe_jax.load(run).tokenizer.bos_id == bos


def test_the_model_of_a_run_becomes_a_checkpoint(tmp_path):
  """If a family computes the same. Its tokenizer says what transformers should know of it."""
  config = dataclasses.replace(moe_jax.Config(), model=MIXTRAL)
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"vocab_size": 264, "domains": []}))
  model, tokenizer = random_model(MIXTRAL, vocab_size=264), load_tokenizer("bytes")
  moe_jax.save(Loaded(model, config, tokenizer, 3, tmp_path), tmp_path / "hf")
  values = read_config(tmp_path / "hf/config.json")
  assert (values["model_type"], values["bos_token_id"], values["pad_token_id"]) == ("mixtral", 256, 257)
  loaded = moe_jax.load(tmp_path / "hf")
  assert_same_model(loaded.model, model)
  text = "aé€\n\t\0 def f(x):  return  x\r\x7f\xad"  # ids of bytes are a file, too
  tokens = loaded.tokenizer.encode(text)
  assert tokens.tolist() == list(text.encode()) and loaded.tokenizer.decode(tokens) == text
  assert (loaded.tokenizer.bos_id, loaded.tokenizer.pad_id) == (256, 257)
