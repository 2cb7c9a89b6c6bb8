"""The text of accounts: one model, or two side by side."""

from collections.abc import Iterator

from moe_jax.analysis.accounting.account import Account

GIB = 2**30


def text(*accounts: Account) -> str:
  """Returns a table with a column for each account. With two, a third column has the ratio of the first to the second."""
  names = [a.name for a in accounts]
  compared = len(accounts) == 2
  lines = [["", *names, *(["ratio"] if compared else [])]]
  for label, values, form in _rows(accounts):
    cells = [form(value) for value in values]
    if compared:
      cells.append(f"{values[0] / values[1]:.3g}" if values[1] and values[0] is not None else "")
    lines.append([label, *cells])
  widths = [max(len(line[i]) for line in lines if len(line) > 1) for i in range(len(lines[0]))]
  return "\n".join(_line(line, widths) for line in lines)


def _line(cells: list[str], widths: list[int]) -> str:
  first, *rest = cells
  return "  ".join(
    [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=False))]
  ).rstrip()


def _rows(accounts: tuple[Account, ...]) -> Iterator[tuple[str, list, object]]:
  """(label, the value of each account, how to write it)."""
  count, billions = (lambda x: f"{x:,}"), (lambda x: f"{x / 1e9:.3f}e9")
  of = lambda get: [get(a) for a in accounts]
  yield "parameters", of(lambda a: a.parameters.total), count
  for kind in accounts[0].parameters._fields:
    if any(getattr(a.parameters, kind) for a in accounts):
      yield f"  {_words(kind)}", of(lambda a, kind=kind: getattr(a.parameters, kind)), count
  if any(a.mtp for a in accounts):
    yield "beside it, multi-token prediction", of(lambda a: a.mtp), count
  yield "active, with embedding and head", of(lambda a: a.active.all), count
  yield "active, with head", of(lambda a: a.active.head), count
  yield "active, without both", of(lambda a: a.active.none), count
  if any(a.active_at_most != a.active for a in accounts):
    yield "active at most, with embedding and head", of(lambda a: a.active_at_most.all), count
  yield "layers with experts", of(lambda a: sum(row.layers for row in a.routed)), count
  if all(a.routed for a in accounts):
    first = lambda get: of(lambda a: get(a.routed[0]))
    yield "  E, routed experts of a layer", first(lambda row: row.num_experts), count
    yield "  K, of them for a token", first(lambda row: row.num_experts_per_token), count
    yield "  E / K", first(lambda row: row.sparsity), lambda x: f"{x:g}"
    yield "  combinations of K experts", first(lambda row: row.combinations), lambda x: f"{x:.4g}"
  yield "vocabulary", of(lambda a: a.vocab_size), count
  yield (
    f"operations per token, L = {accounts[0].sequence_length:,}",
    of(lambda a: a.forward.forward),
    billions,
  )
  for part in accounts[0].forward._fields:
    if any(getattr(a.forward, part) for a in accounts):
      yield f"  {_words(part)}", of(lambda a, part=part: getattr(a.forward, part)), billions
  yield "  training", of(lambda a: a.training_flops), billions
  yield "  decoding at L", of(lambda a: a.decoding_flops), billions
  gib = lambda x: f"{x / GIB:,.4g} GiB"
  for kind in accounts[0].weight_bytes:
    yield f"weights, {kind}", of(lambda a, kind=kind: a.weight_bytes[kind]), gib
  for kind in accounts[0].optimizer_bytes:
    yield f"state of {kind}", of(lambda a, kind=kind: a.optimizer_bytes[kind]), gib
  kib = lambda x: f"{x / 1024:,.4g} KiB"
  if any(a.cache is None for a in accounts):
    return
  yield "cache in bfloat16, per token", of(lambda a: a.cache.per_token), kib
  yield "  per sequence, whatever its length", of(lambda a: a.cache.fixed), kib
  yield "  of a sequence of L tokens", of(lambda a: a.cache.total), kib


def _words(field: str) -> str:
  return field.replace("_", " ")
