r"""Compares decoding with Hugging Face transformers, on one model, as tokens per second.

  taskset -c 0 python scripts/bench_decoding.py

The model is Mixtral-like, with random weights: 4 layers, D = 128, E = 16, K = 2, F = 128, float32. It is made by
transformers, saved, and loaded here, and both must give the same tokens. Both then continue the same prompts greedily in
turns in one process, on one CPU thread, after a run that compiles. Seconds are those of the processor, so that other
programs on the machine count less; on an idle one they equal the clock. Needs the extra `parity`.
"""

import itertools
import statistics
import sys
import tempfile
import time

from absl import flags

from moe_jax import cli

_BATCH = flags.DEFINE_integer("batch_size", 8, "prompts", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt_length", 64, "tokens of each prompt", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 65, "tokens that follow; the first is not timed", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each", lower_bound=1)

SIZES = {
  "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 128, "num_local_experts": 16, "num_experts_per_tok": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096,
  "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def main(argv: list[str]) -> None:
  del argv
  from moe_jax.errors import InputError

  try:
    import torch
    import transformers
  except ImportError as error:
    raise InputError(f"needs {error.name}, run: pip install -e '.[parity]'") from None
  import numpy as np

  import moe_jax
  from moe_jax.inference.generate import generate_tokens

  torch.set_num_threads(1)
  torch.manual_seed(0)
  theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    model = moe_jax.load(folder).model
  shape = (_BATCH.value, _PROMPT.value)
  prompts = np.random.default_rng(0).integers(0, SIZES["vocab_size"], shape)

  def ours() -> tuple[list[list[int]], float]:
    pieces, ends = [], []
    for new in generate_tokens(model, prompts, _NEW.value):
      pieces.append(new)
      ends.append(time.process_time())
    return [list(itertools.chain(*new)) for new in zip(*pieces, strict=True)], ends[-1] - ends[0]

  def generate(count: int) -> tuple[list[list[int]], float]:
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    start = time.process_time()
    with torch.no_grad():
      tokens = theirs.generate(torch.tensor(prompts), **options)
    return tokens[:, _PROMPT.value :].tolist(), time.process_time() - start

  def of_transformers() -> tuple[list[list[int]], float]:
    tokens, seconds = generate(_NEW.value)
    return tokens, seconds - generate(1)[1]

  if ours()[0] != of_transformers()[0]:
    print("error: the two give different tokens", file=sys.stderr)
    sys.exit(1)
  made = _BATCH.value * (_NEW.value - 1)
  runs = [(made / ours()[1], made / of_transformers()[1]) for _ in range(_REPEATS.value)]
  here, there = (statistics.median(of_one) for of_one in zip(*runs, strict=True))
  print(f"moe_jax {here:.0f} tokens/s, transformers {there:.0f} tokens/s, ratio {here / there:.2f}")


if __name__ == "__main__":
  cli.run(main)
