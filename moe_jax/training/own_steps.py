"""Hooks and optimizers of a user's own: their mistakes are one line each, found before anything is trained.

What they make of their state is compared while a step is traced. A state that changes its form would train, and no
checkpoint of it could be read.
"""

import contextlib
import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import Config
from moe_jax.errors import InputError, in_short
from moe_jax.fingerprint import definition, place
from moe_jax.nn.build import naming
from moe_jax.training.objectives import OBJECTIVES
from moe_jax.types import PyTree

_VOCAB, _DOMAINS = 2**16, 2  # of a step that is only traced


@contextlib.contextmanager
def naming_errors(what: str, code: Callable[..., Any]) -> Iterator[None]:
  """Turns an error of a user's code into one line, which has the line of `code` that it comes from."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # of a user's code, which may raise any
    raise InputError(f"{what} ({_where(error, code)}): fails: {in_short(error)}") from error


def _where(error: Exception, code: Callable[..., Any]) -> str:
  try:
    file = inspect.getsourcefile(definition(code))
  except (OSError, TypeError):
    file = None
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
  return f"{file}:{lines[-1]}" if lines else place(code)


def check_new_state(what: str, state: PyTree) -> None:
  """Raises `InputError` if a state has a typed random key, which checkpoints cannot hold."""
  for path, leaf in jax.tree.leaves_with_path(state):
    if jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jax.dtypes.prng_key):
      raise InputError(
        f"{what}: its state{_named(path)} is a typed random key, which a checkpoint cannot hold; keep "
        "jax.random.key_data(key), and use jax.random.wrap_key_data of it"
      )


def check_same(what: str, whose: str, before: PyTree, after: PyTree) -> None:
  """Raises `InputError` if two trees differ in structure, shapes or types. `whose` says which trees."""
  if found := _difference(_described(before), _described(after)):
    raise InputError(
      f"{what}: changes {whose}{found}; it must keep the structure, shapes and types, or no checkpoint of the run could be "
      "read"
    )
  if jax.tree.structure(before) != jax.tree.structure(after):
    raise InputError(
      f"{what}: changes {whose} from a {type(before).__name__} to a {type(after).__name__}, or what is in it; it must keep "
      "the structure, or no checkpoint of the run could be read"
    )


def _described(tree: PyTree) -> dict[str, tuple[str, ...]]:
  """Returns the type and the shape of each leaf, by name."""
  typed = lambda leaf: (str(jnp.result_type(leaf)), f"[{','.join(map(str, jnp.shape(leaf)))}]")
  return {_named(path): typed(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _difference(was: dict[str, tuple[str, ...]], now: dict[str, tuple[str, ...]]) -> str:
  """Returns the first difference in words, or ""."""
  name = next((name for name in was | now if was.get(name) != now.get(name)), None)
  if name is None:
    return ""
  old, new = was.get(name, ("nothing",)), now.get(name, ("nothing",))
  if old[1:] == new[1:]:  # a shape has the vocabulary of a trial, so it is left out where it says nothing
    old, new = old[:1], new[:1]
  return f"{name} from {''.join(old)} to {''.join(new)}"


def _named(path: tuple[Any, ...]) -> str:
  name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
  return f" {name}" if name else ""


def checked(
  name: str, factory: Callable[..., Any], optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns an optimizer of a user's own that is compared with what it must keep while it is traced.

  Raises:
    InputError: if it is no optimizer. Both of its functions raise one if they fail, if its state has a typed key, or if an
      update changes the form of the state.
  """
  what = f"optimizer {name}"
  if not all(callable(getattr(optimizer, part, None)) for part in ("init", "update")):
    raise InputError(
      f"{what} ({place(factory)}): makes a {type(optimizer).__name__}, which is no optax.GradientTransformation"
    )

  def init(params: PyTree) -> PyTree:
    with naming_errors(what, factory):
      state = optimizer.init(params)
    check_new_state(what, state)
    return state

  def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
    with naming_errors(what, factory):
      found, after = optimizer.update(updates, state, params)
    check_same(what, "its state", state, after)
    shapes = lambda tree: {name: form[1:] for name, form in _described(tree).items()}
    if wrong := _difference(shapes(updates), shapes(found)):
      raise InputError(f"{what}: its updates have other shapes than the parameters:{wrong}")
    return found, after

  return optax.GradientTransformation(init, update)


def check_own_step(config: Config, make_init: Callable[..., Any], make_step: Callable[..., Any]) -> None:
  """Raises `InputError` if a hook or an optimizer of a user's own fails, or changes the form of its state or of the model.

  A step is traced and nothing computed. What else may be wrong with the step is not said here.

  Args:
    config: resolved.
    make_init: `moe_jax.training.compiled.make_init`.
    make_step: `moe_jax.training.compiled.make_train_step`.
  """
  if not any(method.source for method in (*config.train.hooks, config.optimizer.optimizer)):
    return
  # Not its own objective, which may read more of a batch, or a teacher. The aux for hooks is that of the model.
  objective = "next_tokens" if config.model.mtp_depth else "next_token"
  same = {"seed": 0, "init_from": "", "objective": OBJECTIVES.resolve(objective)}
  try:
    _trace(dataclasses.replace(config, train=dataclasses.replace(config.train, **same)), make_init, make_step)
  except InputError as error:
    flags = {"hook": ("hooks", config.train.hooks), "optimizer": ("optimizer", config.optimizer.optimizer)}
    flag, value = flags.get(str(error).partition(" ")[0], ("", None))
    with naming(flag, value) if flag else contextlib.nullcontext():
      raise


@functools.lru_cache(maxsize=64)
def _trace(config: Config, make_init: Callable[..., Any], make_step: Callable[..., Any]) -> None:
  shape = config.data.batch_size, config.data.sequence_length
  whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = {"tokens_BL": whole(*shape), "targets_BL": whole(*shape), "domain_B": whole(shape[0])}
  batch["mask_BL"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
  # Without the mesh in use: what is checked does not depend on it.
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.default_device("cpu"):
    try:
      state = jax.eval_shape(make_init(config, _VOCAB), 0)
      jax.eval_shape(make_step(config, _VOCAB, _DOMAINS), state, batch)
    except InputError:
      raise
    except Exception:  # of another part; the program of the run meets the same error
      return
