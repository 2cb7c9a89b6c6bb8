"""Values that programs are often wrong about, and JSON with one of them in some place."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

_INTEGERS = [
  "0",
  "-1",
  "1",
  "2",
  "3",
  "7",
  "64",
  "-7",
  "999999",
  "1e3",
  "1.5",
  "x",
  "",
  " 5",
  "0x10",
  "1_0",
  "٣",
  "+1",
  "1" * 5000,
]
_INTEGERS += [
  str(sign * 2**bits + off) for sign in (1, -1) for bits in (31, 32, 63, 64, 100) for off in (-1, 0)
]
_FLOATS = [
  "nan",
  "inf",
  "-inf",
  "1e308",
  "-1e308",
  "1e-320",
  "-0.0",
  "0",
  "1",
  "-1",
  "0.5",
  "1e999",
  "x",
  "",
  "1,5",
  "1e",
  "9" * 400,
]
_TEXTS = [
  "", " ", "[", "]", "[/red]", "[b]x", "*", "?", "..", "../..", "/dev/null", "/dev/full", "/dev/zero", "/dev/stdin", "/proc/self/mem",
  "/no/such", "\n", "\t", "a\nb", "é", "漢字", "𝕏", "\udcff", "\u202e", "a" * 300, "a" * 5000, "/".join(["a" * 200] * 30), ":", "::",
  "=", ",", ",,", "+", "@", "@@", "none@", "@softmax_topk", "%s", "{0}", "{seed}", "{", "$(x)", "`x`", "~", "~nobody/x", "-", "--",
  "null", "None", "true", "1", "-1", "0/0", "1/0", "2/1", "1/2", "all", "none", "tests", "none,none", "none+none", "1:2:3", "a=b=c",
  "x" + "(" * 2000, "bytes", "bpe:0", "bpe:-1", "bpe:1e9", "bpe:x", "x.json", "x.model", "markov", "stdlib", "text_folder", "tfds:",
  "tfds:x", "huggingface:x",
]  # fmt: skip
_PARTS = [
  "softmax_topk",
  "sigmoid_topk",
  "top_p",
  "expert_choice",
  "hash_topk",
  "noisy_topk",
  "none",
  "switch_loss",
  "z_loss",
]
_PARTS += [
  "loss_free_bias",
  "swiglu",
  "relu",
  "attention",
  "mla",
  "lightning",
  "moe",
  "mlp",
  "soft_moe",
  "next_token",
  "distil",
  "distil_response",
]
_PARTS += [
  "masked_lm",
  "adamw",
  "muon",
  "average",
  "qk_clip",
  "dropless",
  "sorted",
  "einsum",
  "all_to_all",
  "tiny",
  "mixtral_8x7b",
]
_OPTIONS = [
  "weight",
  "rate",
  "scope",
  "p",
  "window",
  "chunks",
  "rule",
  "teacher",
  "normalize",
  "temperature",
  "x",
  "",
]

_letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INTEGERS = st.sampled_from(_INTEGERS) | st.integers(-(10**20), 10**20).map(str)
FLOATS = st.sampled_from(_FLOATS) | st.floats().map(str)
_value = INTEGERS | FLOATS | st.sampled_from(_TEXTS) | _letters
_option = st.builds("{}={}".format, st.sampled_from(_OPTIONS) | _letters, _value) | _value
METHODS = st.builds(
  lambda name, options: ":".join([name, *options]),
  st.sampled_from(_PARTS) | _letters,
  st.lists(_option, max_size=3),
)
SPECS = st.lists(METHODS | st.sampled_from(_TEXTS), min_size=1, max_size=3).flatmap(
  lambda parts: st.sampled_from([",", "+", "@", ", "]).map(lambda by: by.join(parts))
)
TEXTS = st.sampled_from(_TEXTS) | _letters | SPECS

_JSON = st.sampled_from([
  None, True, False, 0, -1, 1, 2, 10**9, 2**63, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "", "x", "[", "a" * 3000, "\ud800", [], {},
  [None], [[]], {"": None}, [1, "a"], {"x": {"y": 1}}, [0] * 2000,
]).map(copy.deepcopy)  # fmt: skip
JSON = _JSON | st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | _letters,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_letters, inner, max_size=3),
  max_leaves=6,
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
  below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  return [path, *(place for key, part in below for place in _places(part, (*path, key)))]


@st.composite
def damaged_objects(draw, value: dict[str, Any]):
  """A JSON object with one to three of its parts replaced, removed or added."""
  value = copy.deepcopy(value)
  for _ in range(draw(st.integers(1, 3))):
    *path, last = draw(st.sampled_from([place for place in _places(value) if place]))
    parent = value
    for key in path:
      parent = parent[key]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if how == "replace":
      parent[last] = draw(JSON)
    elif how == "remove":
      del parent[last]
    elif isinstance(parent, dict):
      parent[draw(_letters)] = draw(JSON)
    if not value:
      break
  return value


@st.composite
def damaged_bytes(draw, data: bytes):
  """Bytes that are cut, flipped, or have others in them."""
  data = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    place = draw(st.integers(0, len(data)))
    how = draw(st.sampled_from(["cut", "flip", "insert"]))
    if how == "cut":
      del data[place:]
    elif how == "flip" and place < len(data):
      data[place] ^= 1 << draw(st.integers(0, 7))
    else:
      data[place:place] = draw(st.binary(max_size=8))
  return bytes(data)


def files(value: dict[str, Any]) -> st.SearchStrategy[bytes]:
  """The bytes of a file that should hold the JSON object `value`."""
  text = json.dumps(value).encode()
  whole = damaged_objects(value).map(lambda x: json.dumps(x).encode())
  return st.one_of(
    whole,
    whole,
    whole,
    damaged_bytes(text),
    st.binary(max_size=30),
    JSON.map(lambda x: json.dumps(x).encode()),
  )
