"""Measures bits per byte and perplexity of a run, or of a Hugging Face checkpoint, on a data set, by domain.

  python scripts/evaluate.py --model=runs/one/arms/softmax_topk/seed_0
  python scripts/evaluate.py --model=RUN --dataset=text_folder --text_folder=my_texts --sequence_length=512

Without further flags the data set is that of the run. The text is cut with the tokenizer of the model, so models with
different tokenizers compare in bits per byte. See docs/inference.md.
"""

import dataclasses
import json

from absl import flags

from moe_jax import cli
from moe_jax.inference import flags as model_flags

_DATASET = flags.DEFINE_string(
  "dataset", "", "stdlib, markov, text_folder or a TFDS name; default: that of the run"
)
_TEXT_FOLDER = flags.DEFINE_string("text_folder", "", "for --dataset=text_folder: one folder per domain")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "where data sets are; default: as in the run")
_LENGTH = flags.DEFINE_integer("sequence_length", 0, "tokens of a window; 0: as in the run")
_BATCH = flags.DEFINE_integer("batch_size", 16, "windows at a time")
_LIMIT = flags.DEFINE_integer("eval_batches", 0, "batches of the validation split; 0: all")
_JSON = flags.DEFINE_string("json", "", "file to write the scores to, too")
model_flags.define_flags()


def main(argv: list[str]) -> None:
  del argv
  from moe_jax.config.fields import positive
  from moe_jax.data import load_dataset
  from moe_jax.errors import InputError
  from moe_jax.inference.evaluate import evaluate

  with model_flags.open_model() as loaded:
    data = loaded.config.data
    given = {
      "dataset": _DATASET,
      "text_folder": _TEXT_FOLDER,
      "data_dir": _DATA_DIR,
      "sequence_length": _LENGTH,
    }
    changed = {name: flag.value for name, flag in given.items() if flag.value}
    data = dataclasses.replace(data, **changed, batch_size=_BATCH.value)
    positive(data, "batch_size", "sequence_length")
    if loaded.tokenizer is None:
      raise InputError(f"--model={loaded.folder}: has no tokenizer, with which the text could be cut")
    # A tokenizer that was trained on this very data set comes with it, and has the tokens cached.
    own = loaded.config.data
    is_own = own.bpe_size and (data.dataset, data.text_folder) == (own.dataset, own.text_folder)
    dataset = load_dataset(data, None if is_own else loaded.tokenizer)
    scores = evaluate(loaded.model, dataset, _BATCH.value, _LIMIT.value)
  width = max(map(len, scores))
  print(f"{'domain':{width}}  bits per byte  perplexity    tokens     bytes")
  for name, score in scores.items():
    bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    print(f"{name:{width}}  {bits:>13}  {score.perplexity:10.2f} {score.num_targets:9} {score.num_bytes:9}")
  if _JSON.value:
    plain = lambda score: (
      score._asdict() | {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    )
    with open(_JSON.value, "w") as file:
      json.dump({name: plain(score) for name, score in scores.items()}, file, indent=1)


if __name__ == "__main__":
  cli.run(main)
