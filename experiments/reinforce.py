"""What do choices of experts that differ between the sampling and the trained model do to policy gradients, and does replay help?

Question   Share of choices that differ, the error of the log-probability ratio that they cause, and the reward, with and without replay.
Command    python experiments/reinforce.py --seeds=5
           python experiments/reinforce.py --task=digits --length=4 --output_dir=runs/reinforce_digits
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    73 s of processor time for --num_steps=120 --rl_steps=20 --seeds=1; not measured at the default length
Result     see docs/adapt.md

A small sparse model is first trained on questions with answers for --num_steps: brackets to be closed, or digits to be sorted. It then
answers new questions, --answers each, drawn at temperature 1 in bfloat16, and is trained in float32 on what it drew, with the clipped
loss of GRPO (2402.03300). The two types route some tokens differently, as inference and training engines do (2510.11370). Arms:

- live: the trained model routes for itself;
- replay: it takes the experts that the sampling model took, with weights from its own logits.

Each line says, before the first update on an answer, the share of the sampling model's choices that the trained one would not make, and the mean
absolute log ratio of their probabilities, with live routes and with replayed ones: without a difference of the models it would be 0. Writes a
row for each step to reinforce.csv, and prints the means. The same command continues with the seeds and arms that are not finished.
"""

import dataclasses
import functools
import itertools
import math
import pathlib

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed

_TASK = flags.DEFINE_enum("task", "brackets", ("brackets", "digits"), "what is asked")
_LENGTH = flags.DEFINE_integer("length", 5, "characters of a question and of its answer", lower_bound=1)
_RL_STEPS = flags.DEFINE_integer("rl_steps", 60, "batches of answers that are trained on", lower_bound=1)
_QUESTIONS = flags.DEFINE_integer("questions", 16, "of a batch", lower_bound=1)
_ANSWERS = flags.DEFINE_integer("answers", 8, "to each question", lower_bound=2)
_UPDATES = flags.DEFINE_integer("updates", 2, "optimizer steps on a batch", lower_bound=1)
_RATE = flags.DEFINE_float("rl_learning_rate", 5e-4, "in the policy gradient", lower_bound=0.0)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs per arm", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/reinforce", "the folder to write")
_SAID_HERE = (
  "dataset",
  "tokenizer",
  "objective",
  "init_from",
  "seed",
  "data_seed",
  "sequence_length",
  "compute_dtype",
)
cli.define_flags(leave_out=_SAID_HERE)
distributed.define_flags()
for module in (cli, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help

HELD_OUT = 64  # questions that are never trained on
ARMS = ("live", "replay")


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.adapt.table import write_table
  from moe_jax.analysis.kept import Kept
  from moe_jax.errors import InputError

  if not flags.FLAGS["preset"].present:
    flags.FLAGS.preset = "tiny"
  config = cli.config_from_flags()
  if not math.isfinite(_RATE.value):
    raise InputError(f"--rl_learning_rate={_RATE.value}: must be a finite number")
  names = ("task", "length", "rl_steps", "questions", "answers", "updates", "rl_learning_rate")
  folder = pathlib.Path(_OUTPUT_DIR.value)
  kept = Kept(folder, {name: flags.FLAGS[name].value for name in names}, config)
  rows, summary = [], []
  for seed in range(_SEEDS.value):
    start = functools.cache(functools.partial(taught, folder, config, seed))
    for arm in ARMS:
      found = kept(
        f"arms/{arm}/seed_{seed}", lambda arm=arm, seed=seed, start=start: tuned(start(), arm, seed)
      )
      rows += [{"arm": arm, "seed": seed} | line for line in found["lines"]]
      summary.append({"arm": arm, "seed": seed} | found["summary"])
  write_table(folder / "reinforce.csv", rows, shown=[])
  write_table(folder / "summary.csv", summary)


def taught(folder: pathlib.Path, config, seed: int):
  """Returns a model that was trained on questions with answers, from an earlier command if it was."""
  from moe_jax.adapt.reinforce import TASKS, split_questions
  from moe_jax.data import load_tokenizer
  from moe_jax.data.prompts import Example, prompt_dataset
  from moe_jax.training.load import load_run
  from moe_jax.training.loop import Run

  task = TASKS[_TASK.value]
  held, draw = split_questions(task, _LENGTH.value, HELD_OUT, seed)
  data = dataclasses.replace(config.data, sequence_length=2 * _LENGTH.value + 2, data_seed=seed)
  train = dataclasses.replace(config.train, seed=seed, objective="response", eval_batches=0)
  config = dataclasses.replace(config, data=data, train=train)
  example = lambda question: Example(f"{question}=", task.answer(question))
  seen = list(dict.fromkeys(draw(4096, 0)))
  splits = (list(map(example, questions)) for questions in (seen, held))
  dataset = prompt_dataset(data, *splits, load_tokenizer("bytes"))
  with cli.said(f"supervised, seed {seed}"):
    Run(config, dataset, folder / "supervised" / f"seed_{seed}").train()
  return load_run(folder / "supervised" / f"seed_{seed}")


def tuned(loaded, arm: str, seed: int) -> dict:
  """Trains a model by policy gradients. Returns a line for each step, and a summary."""
  import jax
  import numpy as np
  import optax
  from flax import nnx

  from moe_jax.adapt.reinforce import TASKS, split_questions
  from moe_jax.errors import NonFiniteLoss
  from moe_jax.training.optim import make_optimizer

  task = TASKS[_TASK.value]
  held, draw = split_questions(task, _LENGTH.value, HELD_OUT, seed)
  optimizer = make_optimizer(
    dataclasses.replace(
      loaded.config.optimizer,
      learning_rate=_RATE.value,
      schedule="constant",
      warmup_steps=1,
      weight_decay=0.0,
    ),
    _RL_STEPS.value * _UPDATES.value,
  )
  graphdef, params, rest = nnx.split(loaded.model, nnx.Param, ...)
  update = jax.jit(functools.partial(_update, graphdef, optimizer))
  state, lines = optimizer.init(params), []
  with cli.said(f"{arm}, seed {seed}"):
    for step in range(_RL_STEPS.value):
      model = nnx.merge(graphdef, params, rest)
      batch, rewards = answered(model, loaded.tokenizer, task, draw(_QUESTIONS.value, 1 + step), step)
      seen = compared(model, batch)
      routes = seen.pop("routes") if arm == "replay" else None
      old = seen.pop("old_log_prob")
      seen.pop("routes", None)
      for i in range(_UPDATES.value):
        params, state, numbers = update(params, rest, state, batch, old, routes)
        if i == 0:
          first = float(numbers.log_ratio)
      if not all(map(math.isfinite, (first, float(numbers.loss), float(optax.global_norm(params))))):
        raise NonFiniteLoss(
          f"{arm} seed {seed} has numbers that are not finite at step {step + 1} of --rl_steps; try a lower --rl_learning_rate"
        )
      lines.append(
        {"step": step + 1, "reward": rewards, **seen, "log_ratio": first, "clipped": float(numbers.clipped)}
      )
    model = nnx.merge(graphdef, params, rest)
    exact = lambda m: answered(m, loaded.tokenizer, task, held, 0, answers=1, temperature=0.0)[1]
    last = lines[-max(1, len(lines) // 5) :]
    means = {name: float(np.mean([line[name] for line in last])) for name in ("reward", "clipped")}
    every = ("differing", "log_ratio_live", "log_ratio_replay")
    means |= {name: float(np.mean([line[name] for line in lines])) for name in every}
    return {
      "lines": lines,
      "summary": {"held_out_before": exact(loaded.model), "held_out_after": exact(model), **means},
    }


def _update(graphdef, optimizer, params, rest, state, batch, old_log_prob_BL, routes_XBLE):
  """One optimizer step on the clipped loss."""
  import jax
  import optax
  from flax import nnx

  from moe_jax.adapt.reinforce import clipped_loss
  from moe_jax.adapt.replay import log_probs

  def loss(params):
    log_prob_BL = log_probs(nnx.merge(graphdef, params, rest), batch, routes_XBLE)
    found = clipped_loss(log_prob_BL, old_log_prob_BL, batch["advantage_B"], batch["is_target_BL"])
    return found.loss, found

  gradients, numbers = jax.grad(loss, has_aux=True)(params)
  updates, state = optimizer.update(gradients, state, params)
  return optax.apply_updates(params, updates), state, numbers


def in_bfloat16(model):
  """Returns the model as the sampling engine has it: the same parameters, computed in bfloat16."""
  from flax import nnx

  config = dataclasses.replace(model.config, compute_dtype="bfloat16")
  return nnx.merge(_structure(config, model.embedding_VD.get_value().shape[0]), nnx.state(model))


@functools.cache
def _structure(config, vocab_size: int):
  """The same object for one configuration, so that programs are compiled once."""
  from flax import nnx

  from moe_jax.nn.transformer import Transformer

  return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, vocab_size, rngs=nnx.Rngs(0))))


def answered(model, tokenizer, task, questions, step: int, answers: int = 0, temperature: float = 1.0):
  """Draws answers. Returns a batch with their advantages, and the mean reward; of one answer each, the share that is right."""
  import numpy as np

  from moe_jax.adapt.reinforce import group_advantages, reward
  from moe_jax.inference.generate import Sampling, generate_tokens

  each, n = answers or _ANSWERS.value, _LENGTH.value
  prompts = [
    np.concatenate([[tokenizer.begin_id()], tokenizer.encode(f"{q}=")])
    for q in questions
    for _ in range(each)
  ]
  sampling = Sampling(temperature=temperature, seed=step)
  pieces = list(generate_tokens(in_bfloat16(model), prompts, n, sampling=sampling))
  drawn = [[*itertools.chain(*parts)] for parts in zip(*pieces, strict=True)]
  expected = [task.answer(q) for q in questions for _ in range(each)]
  rewards = np.array([reward(tokenizer.decode(np.array(d)), e) for d, e in zip(drawn, expected, strict=True)])
  if answers == 1:
    return None, float((rewards == 1).mean())
  ids = np.array([[*prompt, *d] for prompt, d in zip(prompts, drawn, strict=True)], np.int32)
  place = np.arange(ids.shape[1] - 1)
  batch = {
    "tokens_BL": ids[:, :-1],
    "targets_BL": ids[:, 1:],
    "mask_BL": np.ones((len(ids), len(place)), bool),
    "domain_B": np.zeros(len(ids), np.int32),
    "is_target_BL": np.broadcast_to(place >= len(place) - n, (len(ids), len(place))),
    "advantage_B": group_advantages(rewards.reshape(-1, each)).reshape(-1).astype(np.float32),
  }
  return batch, float(rewards.mean())


def compared(model, batch) -> dict:
  """Returns how the model differs from the one that sampled the batch, the routes and the log-probabilities of that one."""
  import numpy as np

  from moe_jax.adapt.replay import record, target_log_probs

  sampler = in_bfloat16(model)
  routes, own = record(sampler, batch), record(model, batch)
  old, live = target_log_probs(sampler, batch), target_log_probs(model, batch)
  replayed = target_log_probs(model, batch, routes)
  mean = lambda x: float(np.abs(x - old)[batch["is_target_BL"]].mean())
  differing = float((routes * (1 - own)).sum() / routes.sum())
  ratios = {"log_ratio_live": mean(live), "log_ratio_replay": mean(replayed)}
  return {"differing": differing, **ratios, "routes": routes, "old_log_prob": old}


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
