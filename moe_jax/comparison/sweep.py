"""Each method at its best: values of one field or option are tried on other seeds than those that are reported.

Every value is trained with the selection seeds. The best becomes the arm of the comparison, under a name that says the
value. No arm is tuned more than another: all have the same values, seeds and goal, and what was tried is listed.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.comparison.goals import goals
from moe_jax.comparison.results import OF_QUANTITIES, PROTOCOL, diverged
from moe_jax.comparison.statistics import Column, columns_of, stat
from moe_jax.config import Config
from moe_jax.errors import InputError, unknown_name
from moe_jax.nn.build import different_blocks, naming, routed_part
from moe_jax.registry import Method, parse_value
from moe_jax.training.protocol import protocol_of
from moe_jax.training.result_file import steps_asked
from moe_jax.training.results import table_columns

Result = dict[str, Any]

# Of data and training, what the validation loss can judge. Another data set, sequence length or objective changes
# what the loss means, and seeds are those of the runs.
_JUDGED = ("batch_size", "num_steps", "accumulation", "hooks")
# What a feed-forward part without a router does not read.
_OF_ROUTING = ("router", "balancers", "dispatcher", "num_experts_per_token", "group_size", "jitter")
_OF_CAPACITY = ("capacity_factor", "eval_capacity_factor")
_OF_OPTIMIZER = ("weight_decay", "beta1", "beta2")
# What a part reads only if its factory has a parameter of that name.
_OFFERED = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "qk_norm", "dense_dim")


class Candidate(NamedTuple):
  """An arm with one of the values that are tried."""

  name: str
  values: Mapping[str, str]  # as text, by field; empty: the arm does not have the option, and is what it was
  fields: Mapping[str, Any]  # what it changes of the arm

  @property
  def value(self) -> str:
    """The values as text, e.g. `weight=0.1`."""
    return " ".join(f"{field}={text}" for field, text in self.values.items())


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The values to try: of an arm, every combination of those that it has.

  Attributes:
    grid: (field, values as text). A field is one of the configuration, an option of a method (`weight`), or an
      option of the methods of one name (`switch_loss.weight`).
    seeds: the selection seeds.
    goal: the key of the column of the table that decides: `nll`, `max_vio`, ...
  """

  grid: tuple[tuple[str, tuple[str, ...]], ...]
  seeds: tuple[int, ...] = (100, 101)
  goal: str = "nll"

  @classmethod
  def parse(cls, texts: Sequence[str], seeds: Sequence[str], goal: str = "nll") -> "Sweep":
    """Returns the sweep of texts such as `weight:0.01,0.1`. Raises `InputError` for any other text."""
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
      field, _, values = (part.strip() for part in text.partition(":"))
      tried = tuple(value.strip() for value in values.split(",") if value.strip())
      if not field or field in grid or len(tried) < 2 or len(set(tried)) < len(tried):
        right = "must be a field and two or more different values, e.g. learning_rate:0.001,0.003,0.01"
        raise InputError(f"--sweep={text}: {right}")
      grid[field] = tried
    if not seeds or not all(seed.strip().isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
      raise InputError(f"--sweep_seeds={','.join(seeds)}: must be different whole numbers, e.g. 100,101")
    return cls(tuple(grid.items()), tuple(map(int, seeds)), goal)

  def check(self, reported_seeds: Sequence[int]) -> None:
    """Raises `InputError` if a selection seed is also reported, or if no column is the goal."""
    both = sorted({*self.seeds} & {*reported_seeds})
    if both:
      others = "choose others, so that the choice does not favour what is reported"
      raise InputError(
        f"--sweep_seeds={','.join(map(str, self.seeds))}: {both[0]} is reported, too; {others}"
      )
    if self.goal not in goals():
      raise unknown_name("--sweep_goal", self.goal, goals())

  def candidates(self, configs: Mapping[str, Config]) -> dict[str, tuple[Candidate, ...]]:
    """Returns what is tried of every arm. An arm without the options has one candidate, itself.

    Args:
      configs: the resolved configurations of the arms.

    Raises:
      InputError: if there is no such field or option, an arm ignores the field or has several methods with the
        option, or a value does not have its type.
    """
    tried = {name: (Candidate(name, {}, {}),) for name in configs}
    for field, texts in self.grid:
      with naming("sweep", f"{field}:{','.join(texts)}"):
        places = {name: _place(name, config, field) for name, config in configs.items()}
        if not any(places.values()):
          options = {option for c in configs.values() for _, _, m in _methods(c) for option, _ in m.options}
          known = {*dict(_fields(next(iter(configs.values())))), *options}
          raise unknown_name("field, and option of these arms", field, known)
        for name, place in places.items():
          if place:
            tried[name] = tuple(
              _with_value(c, configs[name], field, text, place) for c in tried[name] for text in texts
            )
    return tried

  def choose(
    self, candidates: Mapping[str, Sequence[Candidate]], results: Sequence[Result]
  ) -> tuple[dict[str, Candidate], list[dict[str, Any]]]:
    """Returns the best candidate of every arm, and a line of sweep.csv for every candidate.

    The best has the best mean of the goal over the selection seeds. Of equal ones it is the first. A candidate
    with a run whose loss is no longer finite is never the best.

    Raises:
      InputError: if an arm has no candidate whose runs are all finite.
    """
    columns = {column.key: column for column in columns_of([{"columns": table_columns()}])}
    goal, chosen, lines = columns[self.goal], {}, []
    for arm, tried in candidates.items():
      of = {c.name: [r for r in results if r["arm"] == c.name] for c in tried}
      loss = {name: (1 if goal.lower_is_better else -1) * _mean(goal, of[name]) for name in of}
      best = min(tried, key=lambda c: math.inf if math.isnan(loss[c.name]) else loss[c.name])
      if len(tried) > 1 and not math.isfinite(loss[best.name]):
        lost = "diverged" if any(map(diverged, results)) else f"has no finite {self.goal}"
        raise InputError(f"--sweep: arm {arm} {lost} with every value that was tried; try others")
      chosen[arm] = best
      for c in tried:
        lines.append({"arm": arm, "value": c.value, "goal": self.goal})
        lines[-1] |= {"seeds": " ".join(map(str, self.seeds)) if c.value else "", "chosen": c is best}
        lines[-1]["num_steps"] = next(filter(None, map(steps_asked, of[c.name])), "")
        lines[-1] |= {key: _mean(columns[key], of[c.name]) for key in ("nll", "max_vio") if key in columns}
        lines[-1]["note"] = self._note(c, c is best, of[c.name])
    return chosen, lines

  def described(
    self, candidates: Mapping[str, Sequence[Candidate]], configs: Mapping[str, Config]
  ) -> dict[str, Any]:
    """Returns what a report must know of the sweep, as JSON values: see `marked`.

    Args:
      candidates: of every arm.
      configs: the resolved configuration of every candidate.
    """
    keys = [key for key in PROTOCOL if key not in OF_QUANTITIES and key != "eval_sequences"]
    first_values: dict[str, dict[str, Any]] = {}
    for tried in candidates.values():
      protocols = [protocol_of(configs[candidate.name]) for candidate in tried]
      for candidate, own in zip(tried, protocols, strict=True):
        first_values[candidate.name] = {k: protocols[0][k] for k in keys if own.get(k) != protocols[0].get(k)}
    return {
      "fields": [field for field, _ in self.grid],
      "goal": self.goal,
      "seeds": list(self.seeds),
      "protocols": first_values,
    }

  def _note(self, candidate: Candidate, is_best: bool, results: Sequence[Result]) -> str:
    if not candidate.value:
      return "does not have the option"
    diverged = [str(r["seed"]) for r in results if "diverged" in r]
    if diverged:
      return f"diverged with seed {', '.join(diverged)}"
    values = candidate.values
    ends = [f for f, texts in self.grid if is_best and values.get(f) in _ends_of(texts)]
    return f"at the end of what was tried of {', '.join(ends)}" if ends else ""


def _ends_of(texts: Sequence[str]) -> set[str]:
  """Returns the smallest and the largest value; none if they are not numbers, which have an order."""
  try:
    return {min(texts, key=float), max(texts, key=float)}
  except ValueError:
    return set()


class _Place(NamedTuple):
  """Where a configuration has what is swept: a field, or an option of one of its methods."""

  field: str
  option: str = ""
  index: int | None = None  # of the method, if the field has several


def _place(name: str, config: Config, swept: str) -> _Place | None:
  """Returns where the arm `name` has the field or option `swept`; None if no method has the option."""
  if swept in dict(_fields(config)):
    if swept not in _JUDGED and any(swept in _names(part) for part in (config.data, config.train)):
      raise InputError(f"{swept} cannot be chosen by a result; sweep another field")
    why = ignored(config, swept)
    if why:
      raise InputError(f"arm {name} ignores {swept}: {why}; leave the arm or the sweep out")
    if swept == "batch_size" and config.train.eval_batches:
      why = f"--eval_batches={config.train.eval_batches} would evaluate other text with each"
      raise InputError(f"{swept}: {why}; use --eval_batches=0")
    return _Place(swept)
  method_name, _, option = swept.rpartition(".")
  has = lambda m: option in dict(m.options) and method_name in ("", m.name)
  found = [(_Place(field, option, index), method) for field, index, method in _methods(config) if has(method)]
  if len(found) > 1:
    names = [f"{method.name}.{option}" for _, method in found]
    raise InputError(f"arm {name} has {' and '.join(names)}; say one of them")
  return found[0][0] if found else None


def _with_value(candidate: Candidate, config: Config, swept: str, text: str, place: _Place) -> Candidate:
  if place.option:
    own = candidate.fields.get(place.field, getattr(_part(config, place.field), place.field))
    methods = list(own) if isinstance(own, tuple) else [own]
    i = place.index or 0
    methods[i] = methods[i].with_option(place.option, text)
    value = tuple(methods) if isinstance(own, tuple) else methods[0]
  else:
    value = parse_value("sweep", dict(_fields(config))[swept], text)
  values = {**candidate.values, swept: text}
  return Candidate(f"{candidate.name} {swept}={text}", values, {**candidate.fields, place.field: value})


def ignored(config: Config, field: str) -> str:
  """Returns why a resolved configuration does not depend on a field, or "" if it does or nobody can tell."""
  blocks = different_blocks(config.model)
  routed = [layer for layer in map(routed_part, blocks) if layer is not None]
  if not routed and field in (*_OF_ROUTING, *_OF_CAPACITY):
    return f"--ffn={config.model.ffn} does not route"
  if field in _OF_CAPACITY and all(layer.dispatcher.never_drops for layer in routed):
    return f"--dispatcher={config.model.moe.dispatcher} has no capacity"
  if field == "final_learning_rate_fraction" and config.optimizer.schedule == "constant":
    return "--schedule=constant does not decay"
  optimizer = config.optimizer.optimizer
  if field in _OF_OPTIMIZER and not optimizer.takes(field):
    return f"--optimizer={optimizer} does not read it"
  parts = [part for block in blocks for part in (block.mixer, block.ffn, block.residual)]
  if field in _OFFERED and not any(part.takes(field) for part in parts):
    return f"none of {', '.join(dict.fromkeys(map(str, parts)))} reads it"
  return ""


def marked(
  results: Sequence[Result], described: Mapping[str, Any], lines: Sequence[Mapping[str, str]] = ()
) -> list[Result]:
  """Returns the results of a sweep with `swept`, by which tables tell what the sweep changed from what arms are.

  Args:
    results: of the chosen candidates. Those that an earlier command chose, and the last one did not, are marked so.
    described: as from `Sweep.described`; empty: there was no sweep.
    lines: of sweep.csv. An arm that they lack counts as chosen.
  """
  protocols = described.get("protocols", {})
  said = {key: value for key, value in described.items() if key != "protocols"}
  left = {f"{line['arm']} {line['value']}" for line in lines if line["value"] and line["chosen"] != "True"}
  swept = lambda arm: said | {"protocol": protocols[arm], "chosen": arm not in left}
  return [r | {"swept": swept(r["arm"])} if r["arm"] in protocols else r for r in results]


def _mean(column: Column, results: Sequence[Result]) -> float:
  """Returns the mean over seeds; NaN if a seed does not have the quantity."""
  values = [column.value(result) for result in results]
  return math.nan if not values or None in values else stat(values).mean


def _names(part: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(part)]


def _parts(config: Config) -> tuple[Any, ...]:
  return config.model.moe, config.model, config.optimizer, config.data, config.train


def _part(config: Config, field: str) -> Any:
  return next(part for part in _parts(config) if field in _names(part))


def _fields(config: Config) -> Iterator[tuple[str, dataclasses.Field]]:
  """(name, field) of what an arm may set and a text can give."""
  for part in _parts(config):
    yield from ((f.name, f) for f in dataclasses.fields(part) if "help" in f.metadata)


def _methods(config: Config) -> Iterator[tuple[str, int | None, Method]]:
  """(field, its place if the field has several, method) of every method whose options may be swept."""
  for part in _parts(config):
    for name in _names(part):
      value = getattr(part, name)
      if name == "objective" or name not in dict(_fields(config)):
        continue
      if isinstance(value, Method):
        yield name, None, value
      elif isinstance(value, tuple):
        yield from ((name, i, method) for i, method in enumerate(value) if isinstance(method, Method))
