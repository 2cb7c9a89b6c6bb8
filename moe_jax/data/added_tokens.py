"""Tokens that were added to a SentencePiece model, and its special ones: transformers takes them out of a text first.

They are in the files beside a tokenizer.model. A SentencePiece model itself makes pieces of their text.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax import disk
from moe_jax.errors import InputError

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
# Bytes behind a model that change its normalizer: a message of protobuf that comes again is merged with the first.
_NO_PREFIX = bytes([0x1A, 2, 0x18, 0])  # normalizer_spec.add_dummy_prefix = false
_AS_IT_IS = bytes([0x1A, 4, 0x18, 0, 0x20, 0])  # and remove_extra_whitespaces = false


class _Token(NamedTuple):
  id: int
  special: bool = True  # is left out of decoded text
  lstrip: bool = False  # takes the spaces before it
  rstrip: bool = False  # and behind it


class AddedTokens:
  """A SentencePiece model with the tokens of tokenizer_config.json and added_tokens.json beside it.

  Without these files it is the model alone, which takes `<s>` in a text for text.

  Args:
    path: of the SentencePiece model.
    model: what is in it.

  Raises:
    InputError: if a file beside it is damaged, or asks for what is not done here.
  """

  def __init__(self, path: Path, model: Any):
    from sentencepiece import SentencePieceProcessor

    self.model, self.tokens = model, {}
    config, added = (_read(path.parent / name) for name in (CONFIG, ADDED))
    if config is None and added is None:
      return
    whole = path.read_bytes()
    self._inner = SentencePieceProcessor(model_proto=whole + _NO_PREFIX)
    self._decoder = SentencePieceProcessor(model_proto=whole + _AS_IT_IS)
    self._strips = model.encode(" a") == model.encode("a")
    self._every = _read_legacy(path.parent / CONFIG, config or {})
    own = (i for i in range(model.vocab_size()) if model.is_control(i) or model.is_unknown(i))
    self.tokens = {model.id_to_piece(i): _Token(i) for i in own}
    self.tokens |= dict(_of_file(path.parent / ADDED, added or {}))
    self.tokens |= dict(_of_config(path.parent / CONFIG, (config or {}).get("added_tokens_decoder") or {}))
    texts = sorted(self.tokens, key=len, reverse=True)  # the longest that fits
    self._pattern = re.compile(f"({'|'.join(map(re.escape, texts))})")

  @property
  def size(self) -> int:
    """The number of ids; some may not be used."""
    return max([self.model.vocab_size(), *(token.id + 1 for token in self.tokens.values())])

  def id_of(self, text: str) -> int | None:
    """Returns the id of an added or special token, or of a piece of the model; None if there is none."""
    if text in self.tokens:
      return self.tokens[text].id
    i = self.model.piece_to_id(text)
    return (
      i if self.model.id_to_piece(i) == text else None
    )  # the model gives what it does not know an id, too

  def fingerprint(self, of_model: str) -> str:
    """Returns the fingerprint of the model together with the tokens."""
    if not self.tokens:
      return of_model
    found = sorted((text, *token) for text, token in self.tokens.items())
    return hashlib.sha256(repr((of_model, self._every, found)).encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text."""
    if not self.tokens:
      return self.model.encode(text)
    ids, parts = [], self._pattern.split(text)  # texts at even places, tokens at odd ones
    for i, part in enumerate(parts):
      if i % 2:
        ids.append(self.tokens[part].id)
        continue
      if i and self.tokens[parts[i - 1]].rstrip:
        part = part.lstrip()
      if i + 1 < len(parts) and self.tokens[parts[i + 1]].lstrip:
        part = part.rstrip()
      ids += self._encode_part(part, first=i == 0)
    return ids

  def _encode_part(self, text: str, first: bool) -> list[int]:
    """What SentencePiece makes of a text between tokens, with a space before it as `legacy` says.

    Where only the first text gets one, it does not if it begins with a space, or with what the model makes one and strips.
    """
    has_space = text.startswith((" ", "▁")) or (self._strips and text[:1].isspace())
    model = self.model if self._every or (first and not has_space) else self._inner
    return model.encode(text)

  def decode(self, ids: list[int]) -> str:
    """Returns the text of ids, without special tokens and ids that stand for nothing."""
    by_id = {token.id: (text, token.special) for text, token in self.tokens.items()}
    text, pieces = "", []
    for i in ids:
      added, special = by_id.get(i, ("", False))
      if added and not special:
        text, pieces = text + self._decode_pieces(pieces, bool(text)) + added, []
      elif not added and i < self.model.vocab_size() and not self.model.is_control(i):
        pieces.append(i)
    return text + self._decode_pieces(pieces, bool(text))

  def _decode_pieces(self, pieces: list[int], inside: bool) -> str:
    """The text of pieces. Only at the start of a text the space that was put before it is taken away."""
    return (self._decoder if inside else self.model).decode(pieces)


def _read(path: Path) -> Mapping[str, Any] | None:
  if not path.is_file():
    return None
  try:
    values = disk.parse_json(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    raise InputError(f"{path}: is no JSON") from None
  if not isinstance(values, dict):
    raise InputError(f"{path}: must be an object")
  return values


def _read_legacy(path: Path, config: Mapping[str, Any]) -> bool:
  """Whether a space is put before every text between tokens, and not before the first alone."""
  legacy = config.get("legacy")
  if legacy not in (None, True, False):
    raise InputError(f"{path}: legacy={repr(legacy)[:60]}: must be true or false")
  return legacy is not False


def _of_file(path: Path, values: Mapping[str, Any]) -> Iterator[tuple[str, _Token]]:
  for text, i in values.items():
    yield text, _Token(_checked_id(path, text, i))


def _of_config(path: Path, values: Mapping[str, Any]) -> Iterator[tuple[str, _Token]]:
  if not isinstance(values, dict):
    raise InputError(f"{path}: added_tokens_decoder must be an object")
  for name, fields in values.items():
    text = fields.get("content") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text:
      raise InputError(f"{path}: added_tokens_decoder has no text for {str(name)[:60]}")
    if fields.get("single_word"):
      raise InputError(
        f"{path}: {text!r} is a token only as a single word, which tokenizer.model is not read with; make a tokenizer.json: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
      )
    i = int(name) if name.isascii() and name.isdecimal() and len(name) < 11 else name
    flags = (bool(fields.get(flag)) for flag in ("special", "lstrip", "rstrip"))
    yield text, _Token(_checked_id(path, text, i), *flags)


def _checked_id(path: Path, text: str, i: Any) -> int:
  if type(i) is not int or not 0 <= i < 2**31 or not text:
    raise InputError(f"{path}: {text[:60]!r} has the id {repr(i)[:60]}, which must be an integer from 0")
  return i
