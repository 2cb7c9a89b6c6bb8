"""Continues prompts: one prefill for all of them, then token by token behind a cache."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.data.tokenizers import missing_tokenizer
from moe_jax.errors import InputError
from moe_jax.inference.model import check_generates, dropless, on_mesh, rows_of_mesh
from moe_jax.inference.text import TextSoFar
from moe_jax.nn.cache import Cache
from moe_jax.nn.transformer import Transformer
from moe_jax.ops.sampling import next_token
from moe_jax.training.load import Loaded
from moe_jax.types import Array, PyTree

_TEMPERATURES = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # that can be divided by


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a next token is chosen.

  Attributes:
    temperature: logits are divided by it; 0, or less than float32 can divide by (1.2e-38): the most likely token is
      taken.
    top_k: draw from the k most likely tokens; 0: from all.
    top_p: draw from the fewest tokens whose probabilities add up to it; 1: from all.
    seed: of what is drawn, of 32 bits. Prompt i draws the same whatever the other prompts are.

  Raises:
    InputError: if a value is out of range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self) -> None:
    for name, ok, right in (
      ("temperature", self.temperature >= 0, "must be 0 (the most likely token) or above"),
      ("top_k", self.top_k >= 0, "must be 0 (all tokens) or a number of tokens"),
      ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
      ("seed", _is_seed(self.seed), f"must be an integer from 0 to {(1 << 32) - 1}"),
    ):
      if not ok:
        raise InputError(f"--{name}={getattr(self, name)}: {right}")


def _is_seed(seed: int) -> bool:
  """Whether JAX makes a key of it that no other seed has: of more bits, it would leave out the upper ones."""
  return isinstance(seed, int | np.integer) and 0 <= seed < 1 << 32


class Piece(NamedTuple):
  """What one prompt got in one step."""

  text: str  # that is complete; a token may be a part of a character
  tokens: list[int]


def generate(
  loaded: Loaded,
  prompts: str | Sequence[str],
  max_new_tokens: int = 100,
  *,
  sampling: Sampling | None = None,
  stop_ids: Sequence[int] | None = None,
  max_length: int = 0,
  begin: bool = True,
) -> str | list[str]:
  """Returns what follows a prompt, or each of several: `generate(moe_jax.load(folder), "Once upon")`.

  No token is dropped, whatever the dispatcher of the model. On a mesh (`jax.set_mesh`) the model, the batch and
  the cache are sharded.

  Args:
    loaded: a loaded model with its tokenizer.
    prompts: text, or several texts of any lengths.
    max_new_tokens: after so many tokens a text ends.
    sampling: how tokens are chosen; None: the most likely ones.
    stop_ids: a text ends before the first of these tokens. None: those of the model; if it has none, the token
      that begins a document, if that is known.
    max_length: positions that a prompt and what follows may take; 0: those that the model was made for.
    begin: whether the token that begins a document comes before a prompt. Models that were trained here always
      saw it; some published ones never did, or do not say which one it is, and then there is none.

  Raises:
    InputError: if a prompt has no token or too many, the model cannot generate, or an option is out of range.
  """
  given = {"max_new_tokens": max_new_tokens, "sampling": sampling}
  given |= {"stop_ids": stop_ids, "max_length": max_length, "begin": begin}
  pieces = list(stream(loaded, prompts, **given))
  texts = ["".join(piece.text for piece in of_prompt) for of_prompt in zip(*pieces, strict=True)]
  return texts[0] if isinstance(prompts, str) else texts


def stream(
  loaded: Loaded,
  prompts: str | Sequence[str],
  *,
  stop_ids: Sequence[int] | None = None,
  max_length: int = 0,
  begin: bool = True,
  **options: Any,
) -> Iterator[list[Piece]]:
  """Yields pieces of text as they come, one for each prompt. The arguments are those of `generate`."""
  if loaded.tokenizer is None:
    without = "or, with token ids, use moe_jax.inference.generate.generate_tokens"
    raise InputError(f"{missing_tokenizer(loaded.folder)}; {without}")
  texts = [prompts] if isinstance(prompts, str) else list(prompts)
  tokenizer = loaded.tokenizer
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  encoded = [tokenizer.encode(text) for text in texts]
  ids = [np.concatenate([bos, prompt]) if begin and bos else prompt for prompt in encoded]
  stop_ids = (loaded.stop_ids or bos) if stop_ids is None else stop_ids
  max_length = max_length or loaded.max_positions
  so_far = [TextSoFar(tokenizer.decode, prompt) for prompt in encoded]
  for new in generate_tokens(loaded.model, ids, stop_ids=stop_ids, max_length=max_length, **options):
    yield [Piece(text.add(tokens), tokens) for text, tokens in zip(so_far, new, strict=True)]
  yield [Piece(text.rest(), []) for text in so_far]


def generate_tokens(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int = 100,
  *,
  sampling: Sampling | None = None,
  stop_ids: Sequence[int] = (),
  max_length: int = 0,
  tokens_per_call: int = 8,
) -> Iterator[list[list[int]]]:
  """Yields new token ids as they come, a list for each prompt. The list of a text that has ended is empty.

  Args:
    model: is not changed.
    prompts: token ids of the model, at least one for each prompt.
    max_new_tokens, sampling, stop_ids, max_length: as in `generate`; a `max_length` of 0 is no limit.
    tokens_per_call: tokens of each prompt that one call of the compiled program makes. The first one comes alone.

  Raises:
    InputError: see `generate`.
  """
  check_generates(model)
  sampling = sampling or Sampling()
  vocab_size = model.embedding_VD.get_value().shape[0]
  for i, prompt in enumerate(prompts):
    check_ids(f"generate: prompt {i}", prompt, vocab_size)
  check_ids("--stop_ids", stop_ids, vocab_size)
  check_lengths([len(prompt) for prompt in prompts], max_new_tokens, max_length)
  graphdef, state = nnx.split(on_mesh(dropless(model)))
  tokens_BL, pad_B = left_padded(prompts, rows_of_mesh())
  calls = -(-(max_new_tokens - 1) // tokens_per_call)
  columns = _rounded(tokens_BL.shape[1] + calls * tokens_per_call)
  choice = _choice(sampling, len(pad_B))
  found, cache = _prefill(graphdef, state, tokens_BL, pad_B, choice, columns, sampling.top_k)
  left, ended = [max_new_tokens] * len(prompts), [False] * len(prompts)
  for call in range(calls + 1):
    new_BX = np.asarray(found)
    if call < calls:  # the next call runs while these tokens are looked at
      made = np.int32(1 + call * tokens_per_call)
      found, cache = _decode(
        graphdef, state, cache, found[:, -1], choice, made, tokens_per_call, sampling.top_k
      )
    new = [[] if end else row[:n].tolist() for end, row, n in zip(ended, new_BX, left, strict=False)]
    for i, tokens in enumerate(new):
      stop = next((place for place, token in enumerate(tokens) if token in stop_ids), None)
      new[i] = tokens if stop is None else tokens[:stop]
      left[i] -= len(tokens)
      ended[i] |= stop is not None or left[i] == 0
    yield new
    if all(ended):
      return


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
  """Raises `InputError` unless all are integers in [0, vocab_size). JAX would take the nearest id for another one."""
  try:
    array = np.asarray(list(ids) if isinstance(ids, Set) else ids)
  except ValueError:  # lists of several lengths
    array = np.asarray(None)
  is_list = array.ndim == 1 and (array.dtype.kind in "iu" or not array.size)
  wrong = array[(array < 0) | (array >= vocab_size)].tolist() if is_list else [ids]
  if wrong:
    shown = " ".join(repr(wrong[0]).split())[:60]
    raise InputError(f"{name} has {shown}, and the ids of this model are integers from 0 to {vocab_size - 1}")


def check_lengths(lengths: Sequence[int], max_new_tokens: int, max_length: int) -> None:
  """Raises `InputError` unless every prompt has a token, and room for those that follow."""
  if max_new_tokens < 1:
    raise InputError(f"--max_new_tokens={max_new_tokens}: must be positive")
  if not lengths:
    raise InputError("generate: there is no prompt; give one or more")
  for i, length in enumerate(lengths):
    if not length:
      raise InputError(f"generate: prompt {i} has no token; begin with the token that begins a document")
    if max_length and length + max_new_tokens > max_length:
      room = max_length - length
      right = f"use --max_new_tokens={room} or a longer --max_length" if room > 0 else "shorten it"
      raise InputError(
        f"generate: prompt {i} has {length} tokens, and with {max_new_tokens} new ones does not fit into "
        f"max_length={max_length} positions; {right}"
      )


def left_padded(prompts: Sequence[Sequence[int]], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Returns (tokens int32 [B, L], columns of padding before each prompt, int32 [B]).

  L is rounded up, so that prompts of similar lengths share a compiled program, and rows of one token are added
  until B is a multiple of `multiple`.
  """
  rows = [*prompts, *([[0]] * (-len(prompts) % multiple))]
  length = _rounded(max(map(len, rows)))
  pad_B = np.array([length - len(row) for row in rows], np.int32)
  padded = [np.concatenate([np.zeros(pad, np.int32), np.asarray(row)]) for pad, row in zip(pad_B, rows)]
  return np.stack(padded).astype(np.int32), pad_B


def _rounded(length: int) -> int:
  """The next power of two up to 128, and then the next multiple of 128."""
  return max(8, 1 << (length - 1).bit_length()) if length <= 128 else -(-length // 128) * 128


class _Choice(NamedTuple):
  """What the compiled program needs to choose tokens. None: it does not."""

  temperature: float | None
  top_p: float | None
  key_B: Array


def _choice(sampling: Sampling, batch: int) -> _Choice:
  key, (least, most) = jax.random.key(sampling.seed), _TEMPERATURES
  return _Choice(
    temperature=min(sampling.temperature, most) if sampling.temperature >= least else None,
    top_p=sampling.top_p if sampling.top_p < 1 else None,
    key_B=jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch)),
  )


def _chosen(logits_BV: Array, choice: _Choice, number: Array | int, top_k: int) -> Array:
  """The next token of each sequence, its `number`-th new one."""
  key_B = jax.vmap(lambda key: jax.random.fold_in(key, number))(choice.key_B)
  return next_token(logits_BV, key_B, choice.temperature, top_k, choice.top_p)


@functools.partial(jax.jit, static_argnames=("graphdef", "columns", "top_k"))
def _prefill(
  graphdef: nnx.GraphDef,
  state: PyTree,
  tokens_BL: Array,
  pad_B: Array,
  choice: _Choice,
  columns: int,
  top_k: int,
) -> tuple[Array, Cache]:
  logits_BLV, cache = nnx.merge(graphdef, state).prefill(tokens_BL, pad_B, columns)
  return _chosen(logits_BLV[:, -1], choice, 0, top_k)[:, None], cache


@functools.partial(jax.jit, static_argnames=("graphdef", "num_tokens", "top_k"), donate_argnames=("cache",))
def _decode(
  graphdef: nnx.GraphDef,
  state: PyTree,
  cache: Cache,
  token_B: Array,
  choice: _Choice,
  made: Array,
  num_tokens: int,
  top_k: int,
) -> tuple[Array, Cache]:
  """Returns the next `num_tokens` tokens of each sequence, of which `made` are made, and the cache."""
  model = nnx.merge(graphdef, state)

  def one(carry, number):
    token_B, cache = carry
    logits_BLV, cache = model.extend(token_B[:, None], cache)
    token_B = _chosen(logits_BLV[:, -1], choice, number, top_k)
    return (token_B, cache), token_B

  (_, cache), tokens = jax.lax.scan(one, (token_B, cache), made + jnp.arange(num_tokens))
  return tokens.T, cache
