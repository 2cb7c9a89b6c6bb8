"""How many multiplications a token needs to meet other positions, beside the matrices of its mixer.

A mixer of your own has none until you say so:

  @token_products.register
  def _(mixer: MyMixer, length: int, decoding: bool = False) -> float: ...
"""

import functools

from moe_jax.nn.mixers import MLA, Attention, Lightning


@functools.singledispatch
def token_products(mixer: object, length: int, decoding: bool = False) -> float:
  """Returns the multiplications of one token with other positions and with recurrent states.

  Args:
    mixer: a token mixer, whose parameters may be abstract.
    length: L, the tokens of a sequence.
    decoding: count the last token of a sequence, behind a cache of all others, instead of the mean over all tokens.
  """
  del mixer, length, decoding
  return 0.0


@token_products.register
def _(mixer: Attention, length: int, decoding: bool = False) -> float:
  """Scores, and the mixture of the values. With a window w the first w positions see 1, 2, .., w others."""
  heads, head_dim, _ = mixer.w_out_NHD.get_value().shape
  width = 2 * heads * head_dim
  window = min(mixer.window or length, length)
  if decoding:
    return width * window
  behind = (window * (window + 1) / 2 + (length - window) * window) / length
  return width * (behind if mixer.causal else 2 * behind - 1)


@token_products.register
def _(mixer: MLA, length: int, decoding: bool = False) -> float:
  """Behind a cache, keys and values of all heads are the cached vector (the absorbed form)."""
  heads, value, _ = mixer.w_out_NHD.get_value().shape
  if decoding:
    return heads * (2 * mixer.kv_rank + mixer.rope_dim) * length
  return heads * (mixer.nope_dim + mixer.rope_dim + value) * ((length + 1) / 2 if mixer.causal else length)


@token_products.register
def _(mixer: Lightning, length: int, decoding: bool = False) -> float:
  """The recurrent form: a state H x H in each head is updated and read. Working in chunks costs more."""
  del length, decoding
  return 2 * mixer.num_heads * mixer.head_dim**2
