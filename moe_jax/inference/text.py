"""Text from tokens that come one after the other."""

from collections.abc import Callable, Sequence

import numpy as np

_BROKEN = "\ufffd"  # stands where the bytes of a character are not all there yet


class TextSoFar:
  """Decodes the tokens that follow a prompt, in pieces.

  A token may be a part of a character, and a tokenizer may decode a token differently behind others. So all
  tokens are decoded each time, and what is new is returned, but for a character that is not whole yet.

  Args:
    decode: from token ids to text.
    prompt: the token ids before.
  """

  def __init__(self, decode: Callable[[np.ndarray], str], prompt: Sequence[int]):
    self._decode, self._ids = decode, list(prompt)
    self._shown = decode(np.asarray(self._ids, np.int32))

  def add(self, tokens: Sequence[int]) -> str:
    """Returns the text that these tokens complete."""
    self._ids += tokens
    text = self._decode(np.asarray(self._ids, np.int32))
    return self._new(text.rstrip(_BROKEN)) if tokens else ""

  def rest(self) -> str:
    """Returns what is left at the end, with a sign for a character that stayed in parts."""
    return self._new(self._decode(np.asarray(self._ids, np.int32)))

  def _new(self, text: str) -> str:
    new, self._shown = text[len(self._shown) :], max(text, self._shown, key=len)
    return new
