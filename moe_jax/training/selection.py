"""Chooses by name which parameters are trained. The others are frozen and have no optimizer state."""

import difflib
import fnmatch
from collections.abc import Callable

from flax import nnx

from moe_jax.errors import InputError

Path = tuple[str | int, ...]


def dotted(path: Path) -> str:
  """Returns the path of a parameter as text, e.g. segments.0.pattern.blocks.0.ffn.router.w_router_DE."""
  return ".".join(map(str, path))


def _is_routed(path: Path, variable: nnx.Variable) -> bool:
  return variable.get_metadata()["logical_axes"][:1] == ("expert",)


# The names that ST-MoE (2202.08906, section 4.2) compares, and a few more.
SUBSETS: dict[str, Callable[[Path, nnx.Variable], bool]] = {
  "all": lambda path, variable: True,
  "none": lambda path, variable: False,
  "experts": _is_routed,
  "router": lambda path, variable: "router" in path,
  "adapters": lambda path, variable: "adapters" in path,  # low-rank ones
  "ffn": lambda path, variable: "ffn" in path,
  "attention": lambda path, variable: "mixer" in path,
  "embedding": lambda path, variable: dotted(path) in ("embedding_VD", "w_head_DV"),
}
BUT = "all_but_"


def select_trained(model: nnx.Module, selection: str) -> nnx.Module:
  """Returns the model with all parameters frozen that `selection` does not name. What is frozen already stays frozen.

  Args:
    model: may be abstract.
    selection: names and patterns joined by commas. A name is all, none, experts (routed ones), router, adapters
      (low-rank ones), ffn (router and experts included), attention or embedding. A pattern with `*` is matched with the whole path of a
      parameter, or with its end after a dot. `all_but_` before either means all others.

  Raises:
    InputError: if a part of it matches no parameter. The message has the nearest paths.
  """
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  parameters = dict(nnx.to_flat_state(params))
  chosen: set[Path] = set()
  for part in filter(None, (text.strip() for text in selection.split(","))):
    chosen |= _matching(part, parameters)
  frozen = lambda variable: variable.copy(variable.get_value(), group="frozen")
  marked = [(path, v if path in chosen else frozen(v)) for path, v in parameters.items()]
  return nnx.merge(graphdef, nnx.from_flat_state(marked), rest)


def _matching(part: str, parameters: dict[Path, nnx.Param]) -> set[Path]:
  name = part.removeprefix(BUT)
  if name in SUBSETS:
    found = {path for path, variable in parameters.items() if SUBSETS[name](path, variable)}
  else:
    found = {p for p in parameters if fnmatch.fnmatchcase(f".{dotted(p)}", f"*.{name.removeprefix('*.')}")}
  if not found and name != "none":
    raise InputError(f"--trained={part}: matches no parameter; {_nearest(name, parameters)}")
  return parameters.keys() - found if part != name else found


def _nearest(name: str, parameters: dict[Path, nnx.Param]) -> str:
  paths = [dotted(path) for path in parameters]
  ends = {path.rpartition(".")[2]: path for path in paths}
  words = sorted({*SUBSETS, *ends})
  near = difflib.get_close_matches(name.rpartition(".")[2].strip("*"), words, n=3, cutoff=0.4)
  if near:
    return f"did you mean {' or '.join(near)}?"
  return f"names are {', '.join(SUBSETS)}, and paths such as {', '.join(sorted(paths)[:2])}"
