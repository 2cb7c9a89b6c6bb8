"""Trains a model further: all of it, a part by name, or low-rank adapters; on text, or on prompts with responses.

Question   What does fine-tuning gain, how much does it overfit, and what happens to the balance?
Command    python experiments/finetune.py --model=runs/load_balancing/arms/none/seed_0 --dataset=text_folder --text_folder=FOLDER
           python experiments/finetune.py --model=MODEL --train_jsonl=train.jsonl --validation_jsonl=held_out.jsonl
           python experiments/finetune.py --model=MODEL --train_jsonl=T --validation_jsonl=V --trained=all_but_experts
           python experiments/finetune.py --model=MODEL --train_jsonl=T --validation_jsonl=V --adapter_rank=8
           python experiments/finetune.py --model=MODEL --train_jsonl=T --validation_jsonl=V --adapter_rank=8 --adapter_parts=shared
           python experiments/finetune.py --model=MODEL --dataset=stdlib_tasks --held_out_tasks=name --sequence_length=256
Hardware   two CPU cores, 4 GB for a small model; any JAX device
Minutes    those of num_steps
Result     see docs/adapt.md

MODEL is the folder of a run, of an adapted model, or of a published checkpoint. A line of JSONL is
{"prompt": "...", "response": "..."}, with "task" if there are several; the loss is on the response. Each example is a row of its own,
or with --pack_examples several of one task are, which do not see each other. stdlib_tasks are such examples, made of the
standard library. Writes start/ (the model with what is added), run/ (the training), model/ (the result, adapters merged) and
report.json. The same command continues where it was.
"""

import dataclasses
import json
import pathlib

from absl import flags

from moe_jax import cli, disk
from moe_jax.cluster import start as distributed
from moe_jax.config import ModelConfig, MoEConfig

_MODEL = flags.DEFINE_string("model", None, "the folder of the model to train", required=True)
_TRAIN = flags.DEFINE_string(
  "train_jsonl", "", "prompts with responses to train on; empty: the text of --dataset"
)
_VALIDATION = flags.DEFINE_string(
  "validation_jsonl", "", "held-out prompts with responses, with --train_jsonl"
)
_CHAT = flags.DEFINE_bool(
  "chat_template", True, "write JSONL prompts as the chat template of a published model does, if it has one"
)
_RANK = flags.DEFINE_integer(
  "adapter_rank", 0, "rank of low-rank adapters, which alone are trained; 0: none", lower_bound=0
)
_PARTS = flags.DEFINE_list(
  "adapter_parts", [], "what gets adapters: experts, shared, dense, attention; empty: all that the model has"
)
_ALPHA = flags.DEFINE_float("adapter_alpha", 16.0, "an adapter adds adapter_alpha / adapter_rank * A B")
_DROPOUT = flags.DEFINE_float(
  "expert_dropout", 0.0, "share of hidden units of experts that drop out (Switch: 0.4)"
)
_RESIDUAL_DROPOUT = flags.DEFINE_float(
  "dropout", 0.0, "share of what attention and feed-forward parts add that drops out (Switch: 0.1)"
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/finetune", "the folder to write")
# Of the model, these may change. The rest is the model's own.
CHANGEABLE = ("balancers", "dispatcher", "capacity_factor", "eval_capacity_factor", "jitter")
OF_TEXT = ("dataset", "text_folder", "held_out_tasks")  # say which text, where it is not that of JSONL files
_OF_MODEL = {field.name for cls in (ModelConfig, MoEConfig) for field in dataclasses.fields(cls)} - set(
  CHANGEABLE
)
cli.define_flags(leave_out=(*_OF_MODEL, "tokenizer", "objective", "init_from"))
distributed.define_flags()
for module in (cli, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax import adapt
  from moe_jax.data.text_folder import check_outside
  from moe_jax.interop.load import load
  from moe_jax.training.load import load_run
  from moe_jax.training.loop import Run
  from moe_jax.training.made import is_current, is_made, source_of
  from moe_jax.training.progress import TrainingProgress
  from moe_jax.training.start import save_model

  folder = pathlib.Path(_OUTPUT_DIR.value)
  disk.check_folder(folder)
  loaded = load(_MODEL.value)
  dataset, config = data_of(loaded)
  check_outside(folder, config.data)
  before = adapted(loaded.model)
  config = dataclasses.replace(
    config,
    model=before.config,
    train=dataclasses.replace(config.train, init_from=str(folder / "start")),
    optimizer=dataclasses.replace(config.optimizer, trained=trained()),
  )
  drawn = {"seed": config.train.seed} if _RANK.value else {}  # with which adapters begin
  source = source_of(loaded.model, loaded.step, **drawn)
  if not is_made(folder / "start", source):
    save_model(folder / "start", before, config, loaded.tokenizer, dataset.info.domains, source)
  with TrainingProgress(config.train.num_steps) as progress:
    run = Run(config, dataset, folder / "run", progress, show="fine-tuning")
    result = run.train()
  tuned = load_run(folder / "run")
  final = tuned.model
  if _DROPOUT.value:
    final = adapt.unwrap_experts(final)
  if _RESIDUAL_DROPOUT.value:
    final = adapt.set_dropout(final, 0.0)
  if _RANK.value:
    final = adapt.merge_adapters(final)
  source = source_of(tuned.model, tuned.step)
  if not is_current(folder / "model", source):
    save_model(folder / "model", final, tuned.config, loaded.tokenizer, dataset.info.domains, source)
  report = report_of(folder, before, final, run.config, dataset, result)
  disk.write_json(folder / "report.json", report)
  print(json.dumps(report, indent=1))


def trained() -> str:
  if _RANK.value and not flags.FLAGS["trained"].present:
    return "adapters"
  return flags.FLAGS.trained


def data_of(loaded):
  """Returns the data set, with the tokenizer of the model, and the configuration of the flags."""
  from moe_jax.data import load_dataset
  from moe_jax.data.chat import read_chat_template
  from moe_jax.data.loading import check_same_ids
  from moe_jax.data.prompts import PromptDataset, prompt_dataset, read_jsonl
  from moe_jax.errors import InputError
  from moe_jax.training.compiled import objective_of
  from moe_jax.training.tuning import objective_for

  config = cli.config_from_flags()
  data = dataclasses.replace(config.data, tokenizer=loaded.config.data.tokenizer)
  if bool(_TRAIN.value) != bool(_VALIDATION.value):
    raise InputError("--train_jsonl and --validation_jsonl: give both or neither")
  of_text = [f"--{name}" for name in OF_TEXT if flags.FLAGS[name].present]
  if _TRAIN.value and of_text:
    raise InputError(
      f"--train_jsonl and {of_text[0]}: give one, for the examples of the files are all that is trained on"
    )
  check_same_ids(loaded.config.data.dataset, "prompts" if _TRAIN.value else data.dataset)
  if _TRAIN.value:
    if loaded.tokenizer is None:
      raise InputError(f"--model={_MODEL.value}: has no tokenizer, so text cannot be read")
    examples = read_jsonl(_TRAIN.value), read_jsonl(_VALIDATION.value)
    template = read_chat_template(loaded.folder) if _CHAT.value else None
    dataset = prompt_dataset(data, *examples, loaded.tokenizer, template=template)
  else:
    dataset = load_dataset(data, loaded.tokenizer)
  # Behind the ids of the text, an objective may have its own, such as a mask.
  vocab_size = loaded.model.embedding_VD.get_value().shape[0] - objective_of(loaded.config).num_extra_ids
  if dataset.info.vocab_size > vocab_size:
    raise InputError(f"--dataset: has {dataset.info.vocab_size} token ids, and the model {vocab_size}")
  dataset.info = dataset.info._replace(vocab_size=vocab_size)
  objective = objective_for(loaded.config, isinstance(dataset, PromptDataset), f"--model={_MODEL.value}")
  return dataset, dataclasses.replace(
    config, data=data, train=dataclasses.replace(config.train, objective=objective)
  )


def adapted(model):
  """Returns the model with what the flags change and add."""
  from moe_jax import adapt

  for name in ("adapter_parts", "adapter_alpha"):
    if flags.FLAGS[name].present and not _RANK.value:
      disk.note(f"--{name} has no effect without --adapter_rank")
  present = {name: flags.FLAGS[name].value for name in CHANGEABLE if flags.FLAGS[name].present}
  if present:
    model = adapt.change_moe(model, **present)
  if _RANK.value:
    model = adapt.add_adapters(
      model, _RANK.value, _ALPHA.value, parts=_PARTS.value or None, seed=flags.FLAGS.seed
    )
  if _DROPOUT.value:
    model = adapt.wrap_experts(model, f"expert_dropout:rate={_DROPOUT.value}")
  if _RESIDUAL_DROPOUT.value:
    model = adapt.set_dropout(model, _RESIDUAL_DROPOUT.value)
  return model


def report_of(folder, before, final, config, dataset, result) -> dict:
  """Returns what fine-tuning did: losses in nats per target, by task, too; MaxVio (mean over layers); optimizer bytes."""
  import jax
  import numpy as np

  from moe_jax.training.compiled import make_init, resolve_config
  from moe_jax.training.metric_writer import read_jsonl, read_lines
  from moe_jax.training.validate import losses_by_domain, validate

  measured = {}
  for name, model in (("before", before), ("after", final)):
    of_model = resolve_config(dataclasses.replace(config, model=model.config))
    found, by_task = validate(model, of_model, dataset), losses_by_domain(model, of_model, dataset)
    measured[name] = {"nll": found["nll"], "by_task": by_task} | {
      key: float(np.mean(found[key])) for key in ("max_vio",) if key in found
    }
  path = folder / "run" / "metrics.jsonl"
  lines = read_jsonl(path, skip_damaged=True)
  lost = max(result.get("metric_lines", 0) - len(lines), read_lines(path)[1])
  if lost:
    disk.note(f"{path}: {lost} lines are missing or cannot be read; the best step is that of the others")
  points = [(line["eval_nll"], line["step"]) for line in lines if "eval_nll" in line]
  best = min([*points, (measured["after"]["nll"], result["num_steps"])])
  state = jax.eval_shape(make_init(config, dataset.info.vocab_size), 0)
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return {
    "trained": config.optimizer.trained,
    **measured,
    "training_loss": result["training"]["loss"],
    "gap": measured["after"]["nll"] - result["training"]["loss"],
    "best": {"step": best[1], "nll": best[0]} | ({"lines_missing": lost} if lost else {}),
    "optimizer_bytes": size(state.opt_state),
    "parameter_bytes": size(state.params),
    "fingerprint": dataset.info.fingerprint,
  }


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
