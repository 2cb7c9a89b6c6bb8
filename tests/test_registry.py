"""Names become methods: the grammar, what methods are equal, what may be registered, and errors in one line."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import pytest

from moe_jax import fingerprint
from moe_jax.errors import InputError, require_option
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.ffn import FFNS, SHARED_EXPERTS
from moe_jax.nn.mixers import MIXERS
from moe_jax.nn.routers import ROUTERS
from moe_jax.ops.balancing import BALANCERS, make_balancer
from moe_jax.ops.routing import CHOICES, make_choice
from moe_jax.registry import Registry, Spec, split_methods


def one(k, rate: float = 0.5, mode: str = "soft", flag: bool = False, count: int = 3):
  return {"k": k, "rate": rate, "mode": mode, "flag": flag, "count": count}


def bare(k):
  return {"k": k}


REGISTRY = Registry("method", {"one": one, "bare": bare}, offered=("k", "other"))
DEFAULTS = {"k": 7, "rate": 0.5, "mode": "soft", "flag": False, "count": 3}


@pytest.mark.parametrize(
  ("spec", "changed"),
  [
    ("one", {}),
    ("one:0.25", {"rate": 0.25}),
    ("one:1e-3:hard", {"rate": 0.001, "mode": "hard"}),
    ("one:1:hard:true:4", {"rate": 1.0, "mode": "hard", "flag": True, "count": 4}),
    ("one:mode=hard", {"mode": "hard"}),
    ("one:0.25:count=9", {"rate": 0.25, "count": 9}),
    ("one:count=9:rate=0.25", {"rate": 0.25, "count": 9}),
    ("one:flag=True", {"flag": True}),
    ("one:flag=FALSE", {"flag": False}),
    (" one : 0.25 : mode = hard ", {"rate": 0.25, "mode": "hard"}),
    ("one:mode=a=b", {"mode": "a=b"}),
  ],
)
def test_values_fill_the_options_and_take_their_types(spec, changed):
  method = REGISTRY.resolve(spec)
  got = method(k=7, other=1)  # of what it is offered, a factory takes what it names
  assert got == DEFAULTS | changed
  assert (
    REGISTRY.resolve(str(method)) == method and REGISTRY.resolve(functools.partial(one, **changed)) == method
  )
  assert {name: type(value) for name, value in got.items()} == {n: type(v) for n, v in DEFAULTS.items()}


def test_a_factory_without_options():
  assert REGISTRY.resolve("bare")(k=7) == {"k": 7}


BAD_SPECS = [
  ("on", "unknown method 'on': did you mean one? known: bare, one"),
  ("zzz", "unknown method 'zzz': known: bare, one"),
  ("", "unknown method '': known: bare, one"),
  ("two\nlines", "unknown method 'two\\nlines'"),
  ("one:1:soft:true:4:5", "takes 4 values: rate=0.5, mode=soft, flag=False, count=3"),
  ("bare:1", "takes 0 values: none"),
  ("bare:x=1", "no option 'x'; options: none"),
  ("one:speed=1", "no option 'speed'; options: rate=0.5, mode=soft, flag=False, count=3"),
  ("one:k=1", "no option 'k'"),  # what the caller gives is no option
  ("one:fast", "rate must be float, got 'fast'"),
  ("one:", "rate must be float, got ''"),
  ("one:fa\nst", "rate must be float, got 'fa\\nst'"),
  ("one:rate=nan", "rate must be finite, got 'nan'"),
  ("one:rate=-inf", "rate must be finite, got '-inf'"),
  ("one:count=1.5", "count must be int, got '1.5'"),
  ("one:flag=yes", "flag must be true or false, got 'yes'"),
  ("one:flag=1", "flag must be true or false, got '1'"),
  ("one:0.1:rate=0.2", "rate is given twice"),
  ("one:mode=a:mode=a", "mode is given twice"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_SPECS, ids=[repr(spec) for spec, _ in BAD_SPECS])
def test_errors_are_one_line_and_say_what_would_be_right(spec, message):
  with pytest.raises(InputError) as error:
    REGISTRY.resolve(spec)
  text = str(error.value)
  assert message in text
  assert text.startswith(("method ", "unknown method ")) and len(text.splitlines()) == 1


def test_unknown_names_of_the_real_registries_give_the_nearest():
  with pytest.raises(InputError, match="unknown router 'sigmoid_topq': did you mean sigmoid_topk") as error:
    make_choice("sigmoid_topq", 4, 2)
  assert all(name in str(error.value) for name in CHOICES)
  with pytest.raises(InputError, match="unknown balancer 'switchloss': did you mean switch_loss") as error:
    make_balancer("z_loss,switchloss:0.1")
  assert all(name in str(error.value) for name in BALANCERS)


@pytest.mark.parametrize("scope", ["global", "batch", "Sequence"])
def test_options_with_a_list_of_values(scope):
  with pytest.raises(InputError) as error:
    make_balancer(f"switch_loss:0.1:{scope}")
  assert f"scope must be one of sequence, group, micro_batch, buffer, global_batch, got {scope!r}" in str(
    error.value
  )


def test_require_option():
  require_option("thing", "colour", "red", ("red", "blue"))
  with pytest.raises(InputError, match="thing: colour must be one of red, blue, got 'pink'"):
    require_option("thing", "colour", "pink", ("red", "blue"))


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("", []),
    ("a", ["a"]),
    ("a:1,b:2", ["a:1", "b:2"]),
    ("a:1+b:2,c", ["a:1", "b:2", "c"]),
    (" a , , b,", ["a", "b"]),
    ("a,a", ["a", "a"]),
  ],
)
def test_split_methods(text, parts):
  assert split_methods(text) == parts


def _defined(body: str, name: str = "mine"):
  """A function as a notebook cell defines it, with `body` as its result."""
  space = {"__name__": "a_notebook"}
  exec(
    f"SCALE = 2\ndef helper(x):\n  return {body}\ndef {name}(rate: float = 1.0):\n  return helper(rate)",
    space,
  )
  return space[name]


def test_methods_are_equal_if_they_would_build_the_same():
  assert REGISTRY.resolve("one") == REGISTRY.resolve("one:0.5") == REGISTRY.resolve(one)
  assert hash(REGISTRY.resolve("one")) == hash(REGISTRY.resolve("one:rate=0.5"))
  assert REGISTRY.resolve("one") != REGISTRY.resolve("one:0.25")
  first, same, other = (REGISTRY.resolve(_defined(body)) for body in ("x * SCALE", "x * SCALE", "x + SCALE"))
  assert first != other and first != same  # other code, and the same code defined once more
  assert first.fingerprint == same.fingerprint  # but results of another process may be used again
  assert first.fingerprint != other.fingerprint  # the helper that it calls has changed
  assert REGISTRY.resolve("one").fingerprint.startswith("one [")  # this file is a user's


class Times:
  """An object that can be called."""

  def __init__(self, factor):
    self.factor = factor

  def __call__(self, k, rate: float = 0.5):
    return self.factor * k * rate


MADE = {
  "partial": lambda n: functools.partial(one, count=n),
  "partial of a partial": lambda n: functools.partial(functools.partial(one, mode=str(n)), rate=0.1),
  "object": Times,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_partials_and_objects_are_factories(make):
  registry = Registry("method", {}, offered=("k",))
  for number in (1, 1, 2):  # the same cell once more
    registry.register("mine", make(number))
  first, same, other = (registry.resolve(make(number)) for number in (1, 1, 2))
  assert first.fingerprint == same.fingerprint != other.fingerprint
  assert "0x" not in first.fingerprint and first.name in ("one", "Times")
  method = registry.resolve("mine:0.25")
  assert method.source and hash(method) == hash(registry.resolve("mine:0.25"))
  assert dict(method.options)["rate"] == 0.25 and method(k=3) == make(2)(k=3, rate=0.25)


def outer(k, part: str = "one", scale: float = 1.0):
  return {"k": k, "part": part, "scale": scale}


NESTED = Registry("method", {"one": one, "outer": outer}, offered=("k",), wraps="part")


def test_what_is_inside_of_a_method_is_of_it(monkeypatch):
  """A user's code is found there, and a new definition of it makes another method."""
  of = lambda body, spec: (
    monkeypatch.setitem(NESTED._factories, "mine", _defined(body)),
    NESTED.resolve(spec),
  )[1]
  for spec in ("outer:part=mine;3.0", "outer:part=outer;part=mine"):
    first, same, other = (of(body, spec) for body in ("x", "x", "x + 1"))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert first != same and first != other and str(first) == spec
    assert first.own_factories[-1].__name__ == "mine"
  method = of("x + 1", "outer:part=mine;3.0")
  assert method(k=1)["part"](k=1) == 4  # it is resolved once
  outer_code, inner_code = method.source.split("+")
  assert outer_code == NESTED.resolve("outer").code and inner_code == NESTED.resolve("mine").source
  assert NESTED.resolve(functools.partial(outer, part=NESTED.resolve("mine:3"))) == method
  assert NESTED.resolve(NESTED.resolve("outer").with_option("part", "mine;3.0")) == method
  assert NESTED.resolve(method.with_option("part", "one")) == NESTED.resolve("outer")


def test_a_text_that_names_no_part_is_left_to_the_factory():
  method = NESTED.resolve("outer:part=of the user's")
  assert method.inner == () and method(k=1)["part"] == "of the user's"


PARTS = (EXPERTS, FFNS, MIXERS, ROUTERS, SHARED_EXPERTS)


@pytest.mark.parametrize("registry", PARTS, ids=lambda r: r.kind)
def test_each_wrapper_of_this_package_has_the_code_inside(registry, monkeypatch):
  wrappers = [name for name in registry.builtin if registry.wraps in dict(registry.resolve(name).options)]
  assert wrappers
  define = lambda body: monkeypatch.setitem(registry._factories, "mine", _defined(body))
  for name in wrappers:
    assert registry.resolve(name).source == ""
    found = [(define(body), registry.resolve(f"{name}:{registry.wraps}=mine"))[1] for body in ("x", "x + 1")]
    assert found[0] != found[1] and found[0].source[:1] == "+" and found[0].source != found[1].source


def test_no_wrapper_of_this_package_names_what_is_inside_otherwise():
  for registry in PARTS:
    for factory in map(registry.get, registry.builtin):
      signature = inspect.signature(factory.__init__ if isinstance(factory, type) else factory)
      options = signature.parameters.values()
      assert {p.name for p in options if p.annotation is Spec} <= {registry.wraps}


@dataclasses.dataclass
class Unhashable:
  factor: float

  def __call__(self, rate: float = 0.5):
    return self.factor * rate


def test_a_factory_that_cannot_be_used_is_refused_in_one_line():
  registry = Registry("method", {"one": one})
  for factory, message in [
    (Unhashable(2.0), "cannot be hashed; give a function"),
    (max, "no signature found for builtin"),
  ]:
    with pytest.raises(InputError, match=f"^method 'mine'.*{message}"):
      registry.register("mine", factory)
    with pytest.raises(InputError, match=message):
      registry.resolve(factory)


def test_a_name_can_be_defined_anew_but_not_taken():
  registry = Registry("method", {"one": one})
  registry.register("mine", _defined("x"))
  registry.register("mine", _defined("x + 1"))  # the same cell once more
  assert registry.resolve("mine:3")() == 4
  cases = [
    ("one", one, "method 'one' (.*): the name is taken by moe_jax"),
    ("mine", _defined("x", "another"), "method 'mine' (.*): the name is taken by a_notebook"),
    ("a b", one, "method 'a b': a name consists of letters, digits and _"),
    ("number", 3, "method 'number': 3 is no function or class"),
    ("needs", lambda k: k, "takes 'k', which is neither offered .* nor an option with a default"),
  ]
  for name, factory, message in cases:
    with pytest.raises(InputError, match=message):
      registry.register(name, factory)


def test_a_class_counts_with_its_properties_bases_and_plain_constants_only():
  def defined(prop="1", base="2", constant="(1, (2, 'a'))"):
    space = {"__name__": "a_notebook"}
    text = f"""
C, OBJECTS = {constant}, (object(),)
class Base:
  @staticmethod
  def f():
    return {base}
class Part(Base):
  @property
  def causal(self):
    return {prop}, C, OBJECTS
"""
    exec(text, space)
    return REGISTRY.resolve(space["Part"]).fingerprint

  assert defined() == defined()  # an object's address is not what the code is
  assert len({defined(), defined(prop="3"), defined(base="3"), defined(constant="5")}) == 4


@pytest.mark.parametrize(
  "make",
  [
    lambda n: lambda x: n * x,
    lambda n: functools.partial(bare, n),
    lambda n: jax.jit(lambda x: n * x),
    lambda n: functools.partial(jnp.max, axis=n),
    lambda n: Times(n),
    lambda n: (jnp.add, jnp.multiply, max)[n],
  ],
  ids=("closure", "partial", "jitted", "library", "object", "function"),
)
def test_a_digest_of_anything_that_can_be_called(make):
  first, same, other = (fingerprint.digest_of_all([one, make(n)]) for n in (0, 0, 1))
  assert first == same != other
