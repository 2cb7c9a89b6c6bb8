"""`--tokenizer=bpe:SIZE`: a byte-level BPE tokenizer trained on the data set's own training split.

Byte-pair encoding is that of Sennrich et al. (arXiv 1508.07909) on the 256 bytes, as in GPT-2, by the library
`tokenizers`. Text is first divided by GPT-2's regular expression, and no token crosses a division. The end of a
line and the indentation of the next, except for its last space, are one piece, so they merge.

All SIZE ids are those of the 256 bytes, the merges, `bos` and `pad`. The last two are not in the file: text that
spells them is text like any other, so decoding gives back every text.
"""

import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_jax.data.cache import keep, read, texts_key
from moe_jax.data.tokenizers import Tokenizer, with_specials, without_surrogates

NUM_SPECIALS = 2  # bos, pad
_RECIPE = "v1"  # part of the cache key: raise it whenever `train_bpe` gives another tokenizer


def train_bpe(texts: Sequence[str], size: int) -> bytes:
  """Returns the content of a tokenizer.json with `size` - 2 tokens, or fewer if the texts have no more to merge.

  The result depends on the texts and the size only: not on their order, and not on the number of threads.
  """
  import tokenizers

  byte_level = tokenizers.pre_tokenizers.ByteLevel
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = byte_level(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size - NUM_SPECIALS, initial_alphabet=byte_level.alphabet(), show_progress=False
  )
  model.train_from_iterator((without_surrogates(text) for text in texts), trainer)
  return model.to_str(pretty=True).encode()


def load_bpe(content: bytes) -> Tokenizer:
  """Returns the tokenizer of a file that `train_bpe` made."""
  import tokenizers

  model = tokenizers.Tokenizer.from_buffer(content)
  size = model.get_vocab_size()

  def encode(text: str) -> np.ndarray:
    return np.asarray(model.encode(without_surrogates(text), add_special_tokens=False).ids, np.int32)

  def decode(tokens: np.ndarray) -> str:
    return model.decode([int(t) for t in tokens], skip_special_tokens=False)  # ids that it lacks are skipped

  tokenizer = with_specials(encode, decode, size, None, None, hashlib.sha256(content).hexdigest())
  token_bytes = np.zeros(tokenizer.vocab_size, np.int64)
  token_bytes[:size] = [len(model.id_to_token(i)) for i in range(size)]  # one character stands for each byte
  return tokenizer._replace(token_bytes=token_bytes, content=content)


class BpeCache:
  """The trained tokenizer of one training split, and the token ids of texts, in a folder of their own.

  Several processes may make the same files at the same time.

  Args:
    texts: the documents of the training split.
    size: the vocabulary size, with `bos` and `pad`.
    folder: the cache; see `moe_jax.data.cache`.
  """

  def __init__(self, texts: Sequence[str], size: int, folder: Path):
    self.folder = folder / "bpe" / f"{_RECIPE}-{size}-{texts_key(texts)}"
    path = self.folder / "tokenizer.json"
    content = read(path)
    if content is None:
      print(f"training a BPE tokenizer of {size} tokens in {self.folder} (once)", file=sys.stderr)
      content = train_bpe(texts, size)
      keep(path, content)
    self.tokenizer = load_bpe(content)

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the tokens of each text, from the cache if it has them: encoding takes seconds, reading does not."""
    path = self.folder / f"tokens-{self.tokenizer.fingerprint[:16]}-{texts_key(texts)}.npz"
    content = read(path)
    if content is not None:
      with np.load(io.BytesIO(content)) as saved:
        return np.split(saved["tokens"], saved["ends"])[:-1]
    tokens = [self.tokenizer.encode(text) for text in texts]
    dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.int32
    buffer = io.BytesIO()
    ends = np.cumsum([len(t) for t in tokens], dtype=np.int64)
    np.savez(buffer, tokens=np.concatenate([np.zeros(0), *tokens]).astype(dtype), ends=ends)
    keep(path, buffer.getvalue())
    return tokens
