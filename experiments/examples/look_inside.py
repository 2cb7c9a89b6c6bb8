"""A finished run, loaded back: it continues a prompt, and shows which expert took which token.

python experiments/examples/look_inside.py runs/load_balancing/arms/none/seed_0
"""

import sys

import jax.numpy as jnp
import numpy as np

import moe_jax


def main(folder: str, prompt: str = "def main(", num_tokens: int = 20) -> tuple[str, np.ndarray]:
  run = moe_jax.Run.load(folder)
  tokens = [run.tokenizer.bos_id, *run.tokenizer.encode(prompt)]
  for _ in range(num_tokens):
    logits_BLV, _ = run.model(jnp.array([tokens]))
    tokens.append(int(jnp.argmax(logits_BLV[0, -1])))
  text = run.tokenizer.decode(np.array(tokens[1:]))
  print(text)
  _, aux = run.model(jnp.array([tokens]), moe_jax.Context(record_logits=True))
  best_RL = np.concatenate([a.logits_BLE[:, 0].argmax(-1) for a in moe_jax.moe_auxes(aux)])
  for i, token in enumerate(tokens):
    print(f"{run.tokenizer.decode(np.array([token]))!r:8} best expert by layer: {best_RL[:, i].tolist()}")
  return text, best_RL


if __name__ == "__main__":
  main(*sys.argv[1:])
