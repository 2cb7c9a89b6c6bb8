"""The grammar of method specs, and errors that say what would be right."""

import pytest

from moe_jax.errors import InputError, require_option
from moe_jax.ops.balancing import BALANCERS, make_balancer
from moe_jax.ops.routing import ROUTERS, make_router
from moe_jax.registry import build, method_name, split_methods


def one(k, rate: float = 0.5, mode: str = "soft", flag: bool = False, count: int = 3):
  return {"k": k, "rate": rate, "mode": mode, "flag": flag, "count": count}


def bare(k):
  return {"k": k}


REGISTRY = {"one": one, "bare": bare}
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
  got = build("method", REGISTRY, spec, 7)
  assert got == DEFAULTS | changed
  assert {name: type(value) for name, value in got.items()} == {n: type(v) for n, v in DEFAULTS.items()}


def test_a_factory_without_options():
  assert build("method", REGISTRY, "bare", 7) == {"k": 7}


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
    build("method", REGISTRY, spec, 7)
  text = str(error.value)
  assert message in text
  assert text.startswith(("method ", "unknown method ")) and len(text.splitlines()) == 1


def test_unknown_names_of_the_real_registries_give_the_nearest():
  with pytest.raises(InputError, match="unknown router 'sigmoid_topq': did you mean sigmoid_topk") as error:
    make_router("sigmoid_topq", 4, 2)
  assert all(name in str(error.value) for name in ROUTERS)
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


@pytest.mark.parametrize("spec", ["a", "a:1", " a :x=1", "a:1:2"])
def test_method_name(spec):
  assert method_name(spec) == "a"
