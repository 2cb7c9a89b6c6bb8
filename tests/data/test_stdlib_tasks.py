"""Instructions made of a library: the same every time, of one split each, and held-out tasks never in training."""

import ast

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import load_dataset
from moe_jax.data.prompts import PromptDataset
from moe_jax.data.stdlib_tasks import TASKS, fingerprint, read_tasks
from moe_jax.errors import InputError

MODULE = '''
class A:
  def method_{i}(self, x):
    """Adds {i} to x.

    And says so: {i}.
    """
    y = x + {i}
    z = y * {i}
    return y, z

def copied(a):
  b = a
  c = b
  return c
'''


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  root = tmp_path_factory.mktemp("library")
  for i in range(400):
    (root / f"module_{i}.py").write_text(MODULE.format(i=i))
  (root / "test").mkdir()
  (root / "test" / "test_a.py").write_text(MODULE.format(i="9999"))
  (root / "broken.py").write_text("def (")
  return root


def test_each_task_asks_for_what_it_says(library):
  found = read_tasks(root=library)["train"]
  first = {x.task: x for x in reversed(found) if "method" in x.prompt + x.response or x.task == "summary"}
  number = first["docstring"].response.split()[1]
  body = [f"    y = x + {number}\n", f"    z = y * {number}\n", "    return y, z\n"]
  body = [line[2:] for line in body]
  assert first["docstring"].prompt == f"Write the docstring of:\ndef method_{number}(self, x):\n"
  assert first["docstring"].response == f"Adds {number} to x.\n\nAnd says so: {number}."
  assert first["summary"].prompt == f"Sum up:\nAnd says so: {number}.\n"
  assert first["summary"].response == f"Adds {number} to x."
  assert first["name"].prompt == f"Name this function:\ndef f(self, x):\n{''.join(body)}"
  assert first["name"].response == f"method_{number}"
  code = [f"def method_{number}(self, x):\n", *body]
  assert first["reorder"].response == "".join(code)
  shuffled = first["reorder"].prompt.removeprefix("Sort these lines:\n").splitlines(keepends=True)
  assert shuffled != code and sorted(shuffled) == sorted(code)
  assert first["continue"].prompt == f"Continue:\n{''.join(code[:2])}"
  assert first["continue"].response == "".join(code[2:])


def test_no_function_is_in_both_splits_and_held_out_tasks_are_not_trained_on(library):
  splits = read_tasks(("name", "reorder"), root=library)
  assert splits == read_tasks(("name", "reorder"), root=library)
  tasks = {split: {x.task for x in examples} for split, examples in splits.items()}
  assert tasks == {"train": set(TASKS) - {"name", "reorder"}, "validation": set(TASKS)}
  # Whatever is said of a function holds its number, or is of the copied one, which is in one module only.
  numbers = {
    split: {word for x in examples for word in (x.prompt + x.response).split() if word.strip(".:").isdigit()}
    for split, examples in splits.items()
  }
  strip = lambda words: {word.strip(".:") for word in words}
  assert not strip(numbers["train"]) & strip(numbers["validation"]) and "9999" not in strip(numbers["train"])
  everything = [x for examples in splits.values() for x in examples]
  assert sum("copied" in x.prompt + x.response for x in everything) <= 3
  prints = {split: {fingerprint(x.prompt) for x in examples} for split, examples in splits.items()}
  assert not prints["train"] & prints["validation"]


def test_the_library_of_this_interpreter():
  config = DataConfig(dataset="stdlib_tasks", held_out_tasks="name", sequence_length=200, batch_size=4)
  dataset = load_dataset(config)
  assert isinstance(dataset, PromptDataset) and dataset.info.domains == tuple(sorted(TASKS))
  by_task = dict(zip(dataset.info.domains, dataset.info.targets_per_domain["train"], strict=True))
  assert by_task.pop("name") == 0 and min(by_task.values()) > 1000
  assert min(dataset.info.targets_per_domain["validation"]) > 100
  batch = next(dataset.validation_batches())
  assert (batch["mask_BL"].sum(axis=1) <= 200).all() and batch["is_target_BL"].any(axis=1).all()
  for example in read_tasks()["validation"]:
    if example.task == "reorder":
      ast.parse(example.response)
  assert np.isfinite(dataset.info.padded_fraction["train"])


@pytest.mark.parametrize(
  ("held_out", "match"),
  [
    (("nam",), "unknown task 'nam': did you mean name"),
    (tuple(TASKS), "no task is left to train on"),
  ],
)
def test_wrong_tasks_are_refused(held_out, match):
  with pytest.raises(InputError, match=match):
    read_tasks(held_out)


def test_a_library_without_sources_is_refused(tmp_path):
  with pytest.raises(InputError, match="has 0 examples of a task and split"):
    read_tasks(root=tmp_path)
