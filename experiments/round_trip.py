"""A dense model becomes sparse, is trained, and becomes dense or small again: what does each way keep, and at what cost?

Question   Bits per byte, parameters, bytes, balance and speed of every model that one dense model can be turned into.
Command    python experiments/round_trip.py
           python experiments/round_trip.py --preset=tiny --dense_steps=60 --num_steps=60 --distil_steps=60 --output_dir=runs/round_trip_tiny
           python experiments/round_trip.py --model=FOLDER --dataset=text_folder --text_folder=TEXT
Hardware   two CPU cores, 4 GB; any JAX device
Minutes    80 s of processor time for the second command; for the first, four trainings of the default preset more
Result     see docs/adapt.md

A dense model is trained for --dense_steps, or loaded from the folder of a run or of a published checkpoint (--model). Then:

- dense_longer: trained on for --num_steps, the baseline of equal compute;
- upcycled: experts of its feed-forward parts cut in two and copied, 2 per token, so a token meets the same width as before;
- sparse: that model trained for --num_steps. All others are made of it:
- distilled: a dense student of the same width, trained for --distil_steps with a quarter of the loss on its predictions;
- merged, pruned: half of the experts (M-SMoE, 2310.01334; REAP, 2510.13999), in one shot;
- extracted: half of the experts, those that one domain uses (2110.03742), in one shot;
- each of --formats: experts in few bits.

Every training begins anew with the first batch of --data_seed, so dense_longer, sparse and distilled read again what the dense model has
read: the table is of repeated text. Writes the models to models/, which load and train as any other, round_trip.csv and round_trip.png, and prints the table. tokens/s
is of reading a batch. The same command continues where it was.
"""

import dataclasses
import pathlib

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed

_MODEL = flags.DEFINE_string("model", "", "the folder of a dense model to start from; empty: train one")
_DENSE_STEPS = flags.DEFINE_integer("dense_steps", 600, "steps of the dense model", lower_bound=1)
_DISTIL_STEPS = flags.DEFINE_integer("distil_steps", 600, "steps of the dense student", lower_bound=1)
_FORMATS = flags.DEFINE_list(
  "formats", ["int8", "int4:32"], "of quantised experts, with :GROUP for integers and +aware"
)
_DOMAIN = flags.DEFINE_string("domain", "", "what is extracted; empty: the first domain with training text")
_CALIBRATION = flags.DEFINE_integer(
  "calibration", 16, "batches of training text for calibration", lower_bound=1
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/round_trip", "the folder to write")
_OF_EXPERTS = ("num_experts_per_token", "expert_dim", "num_shared_experts", "experts")  # said here
flags.DEFINE_string("balancers", "switch_loss:0.01", "of the sparse models; several are joined by +")
cli.define_flags(leave_out=(*_OF_EXPERTS, "ffn", "objective", "init_from", "balancers"))
distributed.define_flags()
for module in (cli, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help

DENSE, SPARSE = "dense", "sparse"
WAYS_BACK = {
  "merged": "merge_usage",
  "pruned": "output_norm",
  "extracted": "usage",
}  # to methods of a Compressor


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.adapt.quantise import parse_format
  from moe_jax.adapt.table import write_table
  from moe_jax.analysis.deployment import plot_cost

  folder = pathlib.Path(_OUTPUT_DIR.value)
  formats = {text: parse_format(text) for text in _FORMATS.value}
  trip = make_trip(folder)
  rows = [trip.row(*made) for made in products(trip, formats)]
  write_table(folder / "round_trip.csv", rows, shown=[name for name in rows[0] if not name.startswith("in ")])
  print(
    f"every training read the batches of --data_seed={flags.FLAGS.data_seed} from the first one: its text is repeated"
  )
  print(f"written: {plot_cost(folder / 'round_trip.png', rows).path}")


def make_trip(folder: pathlib.Path) -> "Trip":
  """Returns what the flags ask for."""
  from moe_jax.adapt import check_upcycle
  from moe_jax.adapt.table import check_domain, has_training_text
  from moe_jax.comparison.arms import with_arm
  from moe_jax.data import load_dataset
  from moe_jax.interop.load import load
  from moe_jax.nn.build import resolve

  config, loaded = cli.config_from_flags(), None
  if _MODEL.value:
    loaded = load(_MODEL.value)
    data = dataclasses.replace(config.data, tokenizer=loaded.config.data.tokenizer)
    model = dataclasses.replace(loaded.config.model, moe=config.model.moe)
    config = dataclasses.replace(config, model=model, data=data)
  config = with_arm(config, {"ffn": "mlp", "balancers": "none"})
  dataset = load_dataset(config.data, loaded.tokenizer if loaded else None)
  if loaded:
    check_start(loaded, dataset)
  check_upcycle(resolve(config.model), sparse_layers(config.model))  # before anything is trained
  domain = _DOMAIN.value or next(name for name in dataset.info.domains if has_training_text(dataset, name))
  check_domain(dataset, domain)
  return Trip(folder, config, dataset, loaded, domain)


def sparse_layers(dense):
  """Returns the layers with experts that are made of a dense model of this configuration."""
  spec = {"num_experts_per_token": 2, "expert_dim": dense.dense_dim // 2, "experts": dense.activation}
  return dataclasses.replace(dense.moe, balancers=flags.FLAGS.balancers, **spec)


def check_start(loaded, dataset) -> None:
  """Raises `InputError` if the model of `--model` is not dense or not causal, or does not read this text."""
  from moe_jax.errors import InputError
  from moe_jax.nn.build import num_routed_layers
  from moe_jax.training.tuning import check_causal

  check_causal(
    loaded.config, f"--model={_MODEL.value}", "so it predicts no next token; choose a causal model"
  )
  if num_routed_layers(loaded.config.model):
    raise InputError(
      f"--model={_MODEL.value}: has layers with routed experts; the trip begins with a dense model"
    )
  vocab_size = loaded.model.embedding_VD.get_value().shape[0]
  if dataset.info.vocab_size != vocab_size:
    raise InputError(f"--dataset: has {dataset.info.vocab_size} token ids, and the model {vocab_size}")


def products(trip: "Trip", formats: dict):
  """Yields (name, steps of training in all, function that returns the model) of every model, in the order in which they are made."""
  from moe_jax import adapt
  from moe_jax.adapt.compress import Compressor
  from moe_jax.adapt.table import calibration_batches

  before, steps = trip.dense_steps, trip.config.train.num_steps
  yield DENSE, before, trip.dense
  yield "dense_longer", before + steps, lambda: trip.train("dense_longer", steps, trip.dense(), trip.dense())
  yield "upcycled", before, trip.upcycled
  sparse = lambda: trip.train(SPARSE, steps, trip.upcycled(), trip.dense())
  yield SPARSE, before + steps, sparse
  yield "distilled", before + steps + _DISTIL_STEPS.value, lambda: distilled(trip, sparse())
  half = trip.config.model.moe.num_experts // 2

  def smaller(method: str, domain: str = ""):
    return Compressor(sparse(), calibration_batches(trip.dataset, _CALIBRATION.value, domain))(method, half)

  yield "merged", before + steps, lambda: smaller("merge_usage")
  yield "pruned", before + steps, lambda: smaller("output_norm")
  yield f"extracted_{trip.domain}", before + steps, lambda: smaller("usage", trip.domain)

  def quantised(named):
    batches = calibration_batches(trip.dataset, _CALIBRATION.value) if named.aware else ()
    inputs = adapt.expert_inputs(sparse(), batches) if named.aware else None
    return adapt.quantise(sparse(), named.format, named.group, inputs)

  for text, named in formats.items():
    yield text, before + steps, lambda named=named: quantised(named)


def distilled(trip: "Trip", teacher):
  """Trains a dense model of the width that a token meets in the teacher, from what the teacher has beside experts."""
  from moe_jax import adapt

  student = adapt.to_dense(teacher, trip.config.model.dense_dim)
  objective = f"distil:teacher={trip.folder / 'runs' / SPARSE}:soft=0.25"
  return trip.train("distilled", _DISTIL_STEPS.value, student, teacher, objective)


class Trip:
  """The folder of a round trip: runs/ of trainings, start/ of what they start from, models/, rows/ of the table."""

  def __init__(self, folder: pathlib.Path, config, dataset, loaded, domain: str):
    from moe_jax.analysis.kept import Kept
    from moe_jax.config.plain import own_code
    from moe_jax.nn.build import resolve_moe
    from moe_jax.training.made import source_of

    self.folder, self.config, self.dataset, self.domain = folder, config, dataset, domain
    self.moe = sparse_layers(config.model)
    self.loaded, self._made = loaded, {}
    self.dense_steps = loaded.step if loaded else _DENSE_STEPS.value
    names = ("model", "dense_steps", "distil_steps", "calibration", "balancers")
    settings = {name: flags.FLAGS[name].value for name in names}
    settings |= {"domain": domain, "fingerprint": dataset.info.fingerprint}
    if loaded:
      settings["start"] = source_of(loaded.model, loaded.step)
    if code := own_code(resolve_moe(self.moe)):  # the configuration, of the dense model, has no balancers
      settings["code of experts"] = code
    self.kept = Kept(folder, settings, config)

  def row(self, name: str, steps: int, make) -> dict:
    """Returns the line of the model `name`, from what an earlier command measured if it did."""
    from moe_jax.analysis.deployment import measure
    from moe_jax.training.made import is_current, source_of

    def numbers() -> dict:
      with cli.said(name):
        model = make()
        folder, source = self.folder / "models" / name.replace(":", "_"), source_of(model, steps)
        if not is_current(folder, source):
          self.save(folder, model, source)
        return {"model": name, "steps": steps} | measure(model, self.dataset, self.config.train.eval_batches)

    return self.kept(f"rows/{name.replace(':', '_')}", numbers)

  def dense(self):
    return self.loaded.model if self.loaded else self.train(DENSE, self.dense_steps)

  def upcycled(self):
    """Returns the dense model with experts."""
    from moe_jax import adapt

    return adapt.upcycle(self.dense(), self.moe, seed=self.config.train.seed)

  def save(self, folder: pathlib.Path, model, source) -> None:
    """Writes a model that was made of `source`."""
    from moe_jax.training.start import save_model

    save_model(folder, model, self.config, self.dataset.tokenizer, self.dataset.info.domains, source)

  def train(self, name: str, steps: int, start=None, base=None, objective: str = "next_token"):
    """Returns the model `start`, which was made of `base`, or a new one, trained for `steps`. What is trained already is loaded.

    Raises:
      InputError: if what is there was trained otherwise, or from what was made of another model.
    """
    from moe_jax.training import identity
    from moe_jax.training.load import load_run
    from moe_jax.training.loop import Run
    from moe_jax.training.made import is_made, source_of
    from moe_jax.training.progress import TrainingProgress
    from moe_jax.training.result_file import RESULT_FILE, read_result

    if name in self._made:
      return self._made[name]
    folder, init_from = self.folder / "runs" / name, ""
    if start is not None:
      place, source = self.folder / "start" / name, source_of(base)
      init_from = str(place)
      if not is_made(place, source):
        self.save(place, start, source)
    train = dataclasses.replace(self.config.train, num_steps=steps, init_from=init_from, objective=objective)
    config = dataclasses.replace(self.config, train=train, model=start.config if start else self.config.model)
    if read_result(folder / RESULT_FILE) and not identity.is_shorter(folder, config):
      resolved = Run(config, self.dataset, folder).config
      identity.check_same_run(folder, resolved, self.dataset.info.fingerprint)
    else:
      with TrainingProgress(steps) as progress:
        Run(config, self.dataset, folder, progress, show=name).train()
    self._made[name] = load_run(folder).model
    return self._made[name]


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
