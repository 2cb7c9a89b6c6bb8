"""Loads a finished run, continues a prompt, and shows which expert took which token.

python experiments/examples/look_inside.py runs/load_balancing/arms/none/seed_0
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import moe_jax


def main(folder: str, prompt: str = "def main(", num_tokens: int = 20) -> tuple[str, np.ndarray]:
  run = moe_jax.Run.load(folder)
  forward = jax.jit(lambda tokens_BL: run.model(tokens_BL, moe_jax.Context(record_logits=True)))
  start = [run.tokenizer.bos_id, *run.tokenizer.encode(prompt)]
  tokens_L = np.pad(start, (0, num_tokens))  # later positions do not change earlier ones
  for end in range(len(start), len(tokens_L)):
    logits_BLV, aux = forward(tokens_L[None])
    tokens_L[end] = int(jnp.argmax(logits_BLV[0, end - 1]))
  text = run.tokenizer.decode(tokens_L[1:])
  print(text)
  _, aux = forward(tokens_L[None])
  taken_RLE = np.concatenate([a.selected_BLE[:, 0] for a in moe_jax.moe_auxes(aux)]) > 0
  for i, token in enumerate(tokens_L):
    experts = [np.flatnonzero(taken_LE[i]).tolist() for taken_LE in taken_RLE]
    print(f"{run.tokenizer.decode(np.array([token]))!r:8} experts by layer: {experts}")
  return text, taken_RLE


if __name__ == "__main__":
  main(*sys.argv[1:])
