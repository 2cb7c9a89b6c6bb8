"""Counts a model: parameters by kind, active ones, operations, bytes. Nothing is allocated and nothing is trained.

  python scripts/account.py --model=mixtral_8x7b
  python scripts/account.py --model=qwen3_30b_a3b --against=mixtral_8x7b
  python scripts/account.py --model=mixtral_8x7b --sequence_length=32768 --json
  python scripts/account.py --model=~/models/Qwen3-30B-A3B     # the folder of a checkpoint: reads its config.json
  python scripts/account.py --model=runs/one/arms/none/seed_0  # that of a run

`docs/models.md` has the table of all published models and explains the rows.
"""

import json

from absl import flags

from moe_jax import cli
from moe_jax.models import PRESETS

_MODEL = flags.DEFINE_string(
  "model",
  "default",
  f"the folder of a run or of a published checkpoint, or one of {', '.join(sorted(PRESETS))}",
)
_AGAINST = flags.DEFINE_string("against", None, "a second model, for a column beside the first and the ratio")
_VOCAB = flags.DEFINE_integer("vocab_size", 0, "V; 0: that of the model")
_LENGTH = flags.DEFINE_integer(
  "sequence_length", 4096, "L, the tokens of a sequence, for operations and the cache"
)
_JSON = flags.DEFINE_bool("json", False, "print JSON: an object, or a list of two")
flags.DEFINE_list("plugins", [], "Python files or modules that register methods or models of your own")


def main(argv: list[str]) -> None:
  del argv
  from moe_jax.analysis.accounting.account import account
  from moe_jax.analysis.accounting.text import text

  names = [_MODEL.value, *([_AGAINST.value] if _AGAINST.value else [])]
  accounts = [account(name, _VOCAB.value, _LENGTH.value) for name in names]
  if _JSON.value:
    values = [found.to_dict() for found in accounts]
    print(json.dumps(values if _AGAINST.value else values[0], indent=1))
  else:
    print(text(*accounts))


if __name__ == "__main__":
  cli.run(main)
