"""Measures bits per byte and perplexity of a run, or of a Hugging Face checkpoint, on a data set, by domain.

  python scripts/evaluate.py --model=runs/one/arms/softmax_topk/seed_0
  python scripts/evaluate.py --model=RUN --dataset=text_folder --text_folder=my_texts --sequence_length=512

Without further flags the data set is that of the run, of which as much is read as in its evaluations. The text is cut with
the tokenizer of the model, so models with different tokenizers compare in bits per byte. See docs/inference.md.
"""

from absl import flags

from moe_jax import cli, disk
from moe_jax.inference import flags as model_flags

_JSON = flags.DEFINE_string("json", "", "file to write the scores to, too")
model_flags.define_flags()
model_flags.define_data_flags()
flags.adopt_module_key_flags(model_flags)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  from moe_jax.inference.evaluate import evaluate, predicts_responses

  if _JSON.value:
    disk.check_file(_JSON.value, "json")
  with model_flags.open_model() as loaded:
    dataset = model_flags.open_dataset(loaded)
    limits = model_flags.scored_batches(loaded)
    scores = evaluate(loaded.model, dataset, *limits, responses=predicts_responses(loaded.config))
  width = max(map(len, scores))
  print(f"{'domain':{width}}  bits per byte  perplexity    tokens     bytes")
  for name, score in scores.items():
    bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    print(
      f"{name:{width}}  {bits:>13}  {score.perplexity:10.2f} {score.num_targets:9} {score.num_bytes:9.0f}"
    )
  if _JSON.value:
    plain = lambda score: (
      score._asdict() | {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    )
    disk.write_json(_JSON.value, {name: plain(score) for name, score in scores.items()})


if __name__ == "__main__":
  cli.run(main)
