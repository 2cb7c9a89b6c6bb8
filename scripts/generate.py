"""Continues prompts with the model of a run, or of a Hugging Face checkpoint.

  python scripts/generate.py --model=runs/one/arms/softmax_topk/seed_0 --prompt="def main():"
  python scripts/generate.py --model=RUN --prompts_file=prompts.txt --temperature=0.8 --top_p=0.95

One prompt is printed as it comes, several at the end. The last line, on stderr, is the speed: the first tokens with
loading and compilation, and then tokens per second over all prompts. See docs/inference.md.
"""

import sys
import time

from absl import flags

from moe_jax import cli
from moe_jax.inference import flags as model_flags

_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; repeat the flag for several")
_FILE = flags.DEFINE_string("prompts_file", "", "text file with a prompt on each line")
_NEW = flags.DEFINE_integer("max_new_tokens", 100, "tokens after which a text ends")
_LENGTH = flags.DEFINE_integer(
  "max_length", 0, "positions of a prompt and what follows; 0: those of the model"
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "logits are divided by it; 0: the most likely token")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k most likely tokens; 0: from all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the fewest tokens whose probabilities add up to it")
_SEED = flags.DEFINE_integer("seed", 0, "of what is drawn, of 32 bits")
_STOP = flags.DEFINE_list("stop_ids", None, "token ids that end a text; default: those of the model")
_BEGIN = flags.DEFINE_bool("begin", True, "put the token that begins a document before a prompt")
model_flags.define_flags()
flags.adopt_module_key_flags(model_flags)  # shown by --help


def prompts() -> list[str]:
  from moe_jax.data.tokenizers import without_surrogates
  from moe_jax.errors import InputError

  # Bytes of a command line that are not utf-8 are lone surrogates, which cannot be printed either.
  found = [without_surrogates(text) for text in _PROMPT.value]
  if _FILE.value:
    try:
      with open(_FILE.value, encoding="utf-8-sig") as file:
        found += [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f"--prompts_file={_FILE.value}: cannot be read ({error})") from None
  if not found:
    raise InputError("--prompt: give at least one, or --prompts_file")
  return found


def stop_ids() -> list[int] | None:
  from moe_jax.errors import InputError

  try:
    return None if _STOP.value is None else [int(number) for number in _STOP.value]
  except ValueError:
    raise InputError(f"--stop_ids={','.join(_STOP.value)}: must be numbers, e.g. --stop_ids=2,7") from None


def main(argv: list[str]) -> None:
  del argv
  from moe_jax.inference.generate import Sampling, stream

  sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
  options = {"sampling": sampling, "stop_ids": stop_ids(), "max_length": _LENGTH.value, "begin": _BEGIN.value}
  texts, start = prompts(), time.perf_counter()
  continued, ends, counts = list(texts), [], []
  with model_flags.open_model() as loaded:
    for pieces in stream(loaded, texts, max_new_tokens=_NEW.value, **options):
      ends.append(time.perf_counter())
      counts.append(sum(len(piece.tokens) for piece in pieces))
      if len(texts) == 1:
        print(texts[0] * (len(ends) == 1) + pieces[0].text, end="", flush=True)
      continued = [text + piece.text for text, piece in zip(continued, pieces, strict=True)]
  print("\n".join(["", *continued][len(texts) == 1 :]) if len(texts) > 1 else "")
  # Decoding is compiled, and starts, before the first token is here.
  seconds, tokens = ends[-1] - ends[0], sum(counts[1:])
  speed = f", then {tokens / seconds:.0f} tokens/s" if tokens and seconds else ""
  print(f"{sum(counts)} tokens; first step {ends[0] - start:.1f} s{speed}", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)
