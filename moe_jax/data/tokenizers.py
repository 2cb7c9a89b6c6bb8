"""Tokenizers: bytes, a SentencePiece model or a Hugging Face tokenizer.json. `moe_jax.data.bpe` trains one.

Every document begins with `bos_id`. `pad_id` fills masked positions only. If a tokenizer file lacks these tokens,
they get new ids after its own, unless it came with a published model, which has no more ids. `vocab_size` is rounded up to a multiple of 8, so that the embedding can be divided
over devices. The ids above the last real one never occur.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.added_tokens import AddedTokens
from moe_jax.data.chat import read_specials
from moe_jax.data.model_ids import ModelIds, read_ids
from moe_jax.errors import InputError

# tokenizer.json does not say which special token begins a document. These names cover the usual models. Their order stays:
# models were trained with the first one that a file has.
_BEGINS = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>", "</s>", "[CLS]")


class Tokenizer(NamedTuple):
  encode: Callable[[str], np.ndarray]  # text -> [tokens] int32, no bos
  decode: Callable[[np.ndarray], str]
  vocab_size: int
  bos_id: int | None  # None: a published model does not say which token begins a document
  pad_id: int
  fingerprint: str  # identifies the tokenizer; equal for equal files in any location
  # [V] utf-8 bytes of each id, 0 for specials; None where a token is not a fixed string of bytes
  token_bytes: np.ndarray | None = None
  content: bytes | None = None  # the tokenizer.json, if it was trained on the data set itself
  ids: ModelIds | None = None  # of the published model that it came with
  folder: Path | None = None  # with the files of that model

  def begin_id(self) -> int:
    """Returns `bos_id`, for text that needs it. Raises `InputError` if there is none."""
    if self.bos_id is None:
      raise InputError(
        f"{self.folder}: no file says which token begins a document; name it as bos_token in {self.folder}/tokenizer_config.json"
      )
    return self.bos_id


def load_tokenizer(name: str, ids: ModelIds | None = None) -> Tokenizer:
  """Loads `bytes`, a SentencePiece `.model` file, or a Hugging Face `.json` file.

  Args:
    name: what to load.
    ids: of the model that the tokenizer belongs to. None: those that the run in its folder has of a published model; if
      there are none, special tokens that the tokenizer lacks get new ids. If they lack the token that begins a document,
      it is the `bos_token` of tokenizer_config.json, or one of a usual name.

  Raises:
    InputError: if there is no such tokenizer, or it has more ids than the model.
  """
  if name == "bytes":
    return _bytes_tokenizer()
  if name.startswith("bpe:"):
    right = "needs a data set of limited size, whose text it is trained on: stdlib, text_folder, or TFDS up to 64 MB"
    raise InputError(f"--tokenizer={name}: {right}")
  path = Path(name).expanduser()
  if path.suffix not in (".model", ".json"):
    right = "must be bytes, bpe:SIZE, a SentencePiece .model file or a Hugging Face tokenizer.json"
    raise InputError(f"--tokenizer={name}: {right}")
  if not path.is_file():
    raise InputError(f"--tokenizer={name}: no such file")
  ids = ids or read_ids(path.parent)
  load = _sentencepiece_tokenizer if path.suffix == ".model" else _hugging_face_tokenizer
  return load(path, ids)


def missing_tokenizer(folder: str | os.PathLike[str]) -> InputError:
  """Returns the error for a model without a tokenizer. Where its files can be converted, it says how."""
  path = Path(folder)
  how = "it has {}, of which transformers makes a tokenizer.json: {} (docs/checkpoints.md)"
  if (path / "tiktoken.model").exists():
    own = how.format("tiktoken.model", "convert_tiktoken_to_fast")
  elif (path / "vocab.json").exists():
    own = how.format("vocab.json", "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
  else:
    own = "put its tokenizer.json there"
  return InputError(f"{folder}: has no tokenizer (tokenizer.json or tokenizer.model); {own}")


def without_surrogates(text: str) -> str:
  """Replaces lone surrogates, which utf-8 does not have, by question marks, as the bytes tokenizer does."""
  return text if text.isascii() else text.encode(errors="replace").decode()


def _bytes_tokenizer() -> Tokenizer:
  """Token ids are the 256 bytes of utf-8, then bos and pad."""

  def encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int32)

  def decode(tokens: np.ndarray) -> str:
    tokens = np.asarray(tokens)
    return tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors="replace")

  tokenizer = with_specials(encode, decode, size=256, bos=None, pad=None, fingerprint="bytes")
  return tokenizer._replace(token_bytes=(np.arange(tokenizer.vocab_size) < 256).astype(np.int64))


def bytes_file() -> bytes:
  """Returns a tokenizer.json whose ids are the bytes of utf-8, for those who have no `--tokenizer=bytes`."""
  import tokenizers

  # GPT-2's characters for bytes: those that can be printed stand for themselves, the others for 256 and up.
  printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = [byte for byte in range(256) if byte not in printed]
  vocab = {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  return model.to_str(pretty=True).encode()


def _sentencepiece_tokenizer(path: Path, ids: ModelIds | None) -> Tokenizer:
  try:
    import sentencepiece
  except ImportError:
    raise InputError(f"{_given(path, ids)}: needs SentencePiece, run: pip install sentencepiece") from None
  try:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (OSError, RuntimeError) as error:
    raise InputError(f"{_given(path, ids)}: is not a SentencePiece model ({_first_line(error)})") from None
  added = AddedTokens(path, model)

  def encode(text: str) -> np.ndarray:
    return np.asarray(added.encode(without_surrogates(text)), np.int32)

  def decode(tokens: np.ndarray) -> str:
    return added.decode([int(t) for t in tokens])

  named = map(added.id_of, () if ids is None else _named_bos(path))
  bos = next((i for i in (*named, model.bos_id(), model.eos_id()) if i is not None and i >= 0), None)
  pad = model.pad_id() if model.pad_id() >= 0 else None
  tokenizer = _of_file(encode, decode, added.size, bos, pad, path, ids)
  return tokenizer._replace(fingerprint=added.fingerprint(tokenizer.fingerprint))


def _hugging_face_tokenizer(path: Path, ids: ModelIds | None) -> Tokenizer:
  import tokenizers

  try:
    model = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises plain Exception
    raise InputError(f"{_given(path, ids)}: is not a tokenizer.json ({_first_line(error)})") from None
  model.no_truncation()
  model.no_padding()

  def encode(text: str) -> np.ndarray:
    return np.asarray(model.encode(without_surrogates(text), add_special_tokens=False).ids, np.int32)

  def decode(tokens: np.ndarray) -> str:
    return model.decode([int(t) for t in tokens], skip_special_tokens=True)

  bos = _first_id(model, _BEGINS if ids is None else (*_named_bos(path), "<|startoftext|>", *_BEGINS))
  pad = _first_id(model, ("<pad>", "[PAD]", "<|pad|>"))
  size = 1 + max(model.get_vocab(with_added_tokens=True).values())  # ids can have gaps
  return _of_file(encode, decode, size, bos, pad, path, ids)


def _given(path: Path, ids: ModelIds | None) -> str:
  """What names the file in an error: the flag, or the file alone if it came with a model."""
  return f"--tokenizer={path}" if ids is None else str(path)


def _named_bos(path: Path) -> list[str]:
  """What tokenizer_config.json beside the tokenizer of a published model calls the token that begins a document, if it does."""
  return [text for name, text in read_specials(path.parent).items() if name == "bos_token"]


def _first_id(model: Any, names: Sequence[str]) -> int | None:
  return next((i for i in map(model.token_to_id, names) if i is not None), None)


def _of_file(
  encode: Callable,
  decode: Callable,
  size: int,
  bos: int | None,
  pad: int | None,
  path: Path,
  ids: ModelIds | None,
) -> Tokenizer:
  if ids is None:
    return with_specials(encode, decode, size, bos, pad, _file_hash(path))
  if size > ids.vocab_size:
    raise InputError(
      f"{path}: has ids up to {size - 1}, and the model a vocabulary of {ids.vocab_size}; use the tokenizer of the model"
    )
  first = lambda *choices: next((choice for choice in choices if choice is not None), None)
  bos_id, pad_id = first(ids.bos_id, bos), first(ids.pad_id, pad, 0)
  tokenizer = Tokenizer(encode, decode, ids.vocab_size, bos_id, pad_id, _file_hash(path))
  return tokenizer._replace(ids=ids._replace(bos_id=bos_id), folder=path.parent)


def with_specials(
  encode: Callable, decode: Callable, size: int, bos: int | None, pad: int | None, fingerprint: str
) -> Tokenizer:
  """Assigns new ids to missing special tokens and rounds the size up to a multiple of 8."""
  if bos is None:
    bos, size = size, size + 1
  if pad is None:
    pad, size = size, size + 1
  return Tokenizer(encode, decode, -(-size // 8) * 8, bos, pad, fingerprint)


def _file_hash(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
