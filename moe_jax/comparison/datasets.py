"""The data that the arms of a comparison read: the same text, maybe in other batches."""

from collections.abc import Mapping

from moe_jax.config import Config, DataConfig
from moe_jax.data import Dataset, load_dataset
from moe_jax.data.dataset import DatasetInfo
from moe_jax.errors import InputError


def datasets_of_arms(
  configs: Mapping[str, Config], shared: DataConfig, dataset: Dataset
) -> dict[DataConfig, Dataset]:
  """Returns the data set for every data configuration of an arm, such as one with another batch size.

  Args:
    configs: of the arms, by name.
    shared: the data configuration of the comparison.
    dataset: what it reads.

  Raises:
    InputError: if an arm reads other text or other tokens than the comparison.
  """
  found = {shared: dataset}
  for name, config in configs.items():
    if config.data not in found:
      found[config.data] = load_dataset(config.data)
    if found[config.data].info.fingerprint != dataset.info.fingerprint:
      raise InputError(
        f"arm {name}: reads other text or tokens than the comparison; compare texts in folders of their own"
      )
  return found


def in_words(info: DatasetInfo) -> str:
  """Returns a line about a data set: its name and fingerprint, its size, and what it consists of."""
  shares = ""
  if "train" in info.targets_per_domain:
    counts = info.targets_per_domain["train"]
    of_each = (f"{name} {n / sum(counts):.0%}" for name, n in zip(info.domains, counts, strict=True))
    shares = f", {sum(counts) / 1e6:.1f}M training tokens: {', '.join(of_each)}"
  return f"data: {info.name} (fingerprint {info.fingerprint[:12]}){shares}"
