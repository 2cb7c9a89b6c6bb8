"""Reads any TFDS text data set by name, without TensorFlow, from ArrayRecord files on disk.

A small data set is tokenised when it is opened, like every in-memory data set. A large one is cut lazily; see
`moe_jax.data.document_stream`.
"""

import difflib
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from moe_jax import disk
from moe_jax.config import DataConfig
from moe_jax.data.dataset import Dataset, DatasetInfo, dataset_of_texts
from moe_jax.data.document_stream import StreamedDataset
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.data.windows import Text, fingerprint_texts, text_digest
from moe_jax.errors import InputError, unknown_name

IN_MEMORY_BYTES = 64_000_000  # prepared data sets up to this size are tokenised when they are opened
FINGERPRINT_DOCUMENTS = 1000  # of each split of a larger data set
# Names that are known without their builders: TFDS registers some of them only if TensorFlow is installed.
_WELL_KNOWN = ("c4", "lm1b", "pg19", "tiny_shakespeare", "wiki40b", "wikipedia")


def load_tfds(
  config: DataConfig, data_dir: str, built_in: Sequence[str], tokenizer: Tokenizer | None = None
) -> Dataset:
  """Opens `config.dataset` in `data_dir`, or else in TFDS's default folder.

  The text is the feature `text`, or the only text feature. A class label named `domain` or `label` gives the
  domains. Without one, there is a single domain named after the data set. The validation split is `validation` or
  `test`, or the last 1% of train. Where documents of a small data set are in both, one line says how many.

  A `tokenizer` stands for the one that the configuration names.

  This function never downloads anything: c4/en has 800 GB, and a typing error should not fetch it.

  Raises:
    InputError: if the name is unknown, or the data set is not prepared on disk, is not in ArrayRecord format, or
      has no usable text feature.
  """
  if re.match(
    r"[^/]*:(?![\d.*]+$)", config.dataset
  ):  # such as huggingface:NAME, which TFDS looks for on the network
    raise InputError(
      f"--dataset={config.dataset}: must be {', '.join(built_in)}, or NAME, NAME/CONFIG or NAME:VERSION of a TFDS data set "
      "that is prepared on disk; nothing is downloaded"
    )
  builder = _open(config.dataset, data_dir, built_in)
  text_feature, domain_feature, domains = _features(config.dataset, builder.info.features)
  sources = {
    split: TextSource(builder.as_data_source(name), text_feature, domain_feature, str(builder.data_path))
    for split, name in _split_names(config.dataset, builder.info.splits).items()
  }
  if builder.info.dataset_size <= IN_MEMORY_BYTES:
    texts = {split: [source[i] for i in range(len(source))] for split, source in sources.items()}
    _note_copies(config.dataset, texts)
    return dataset_of_texts(config, config.dataset, texts, domains, ("dataset", config.dataset), tokenizer)
  tokenizer = tokenizer or load_tokenizer(config.tokenizer)
  first = {
    s: [source[i] for i in range(len(source))[:FINGERPRINT_DOCUMENTS]] for s, source in sources.items()
  }
  counts = {s: len(source) for s, source in sources.items()}
  identity = f"{builder.info.full_name} {counts} {fingerprint_texts(first, domains, tokenizer)}"
  info = DatasetInfo(
    name=config.dataset,
    vocab_size=tokenizer.vocab_size,
    domains=domains,
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    num_windows={},
    targets_per_domain={},
    padded_fraction={},
    num_bytes={},
    bytes_per_domain={},
    bytes_per_token=None,  # `StreamedDataset` measures it
    yardsticks={},
  )
  return StreamedDataset(config, info, sources["train"], sources["validation"], tokenizer)


def _note_copies(name: str, splits: dict[str, list[Text]]) -> None:
  """Says how many documents of validation are in training, too. The splits remain those of the data set."""
  train = {text_digest(text) for text, _ in splits["train"]}
  digests = [text_digest(text) for text, _ in splits["validation"] if text.strip()]
  if copies := sum(digest in train for digest in digests):
    disk.note(f"--dataset={name}: {copies} of {len(digests)} documents of validation are in training, too")


class TextSource:
  """Random access to the documents of one split, as `Text`. `folder` has its files."""

  def __init__(
    self, examples: Sequence[dict[str, Any]], text_feature: str, domain_feature: str | None, folder: str = ""
  ):
    self._folder = folder
    self._examples = examples
    self._text_feature = text_feature
    self._domain_feature = domain_feature

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> Text:
    try:
      example = self._examples[index]
    except IndexError:
      raise
    except Exception as error:  # whatever damaged bytes lead to
      reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
      raise InputError(
        f"--data_dir: {self._folder} is damaged (document {index}: {reason}); prepare the data set again, with tfds build"
      ) from None
    text = example[self._text_feature]
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    # An unlabelled example (-1 by TFDS convention) counts towards the first domain.
    return Text(text, max(0, int(example[self._domain_feature])) if self._domain_feature else 0)


def _open(name: str, data_dir: str, built_in: Sequence[str]) -> Any:
  """Returns the read-only builder of a prepared data set."""
  import tensorflow_datasets as tfds

  for folder in (data_dir, tfds.core.constants.DATA_DIR):  # strings: pathlib would break gs://
    try:
      builder = tfds.builder(name, data_dir=folder)
      prepared = builder.is_prepared()
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, FileNotFoundError):
      continue
    if prepared:
      if builder.info.file_format.value != "array_record":
        right = f"is prepared as {builder.info.file_format.value}; run: {_build_command(name, data_dir)}"
        raise InputError(f"--dataset={name}: {right}")
      return builder
  registered = set(tfds.list_builders(with_community_datasets=False)) | set(_WELL_KNOWN)
  base = name.split("/")[0].split(":")[0]
  if base not in registered:
    near = difflib.get_close_matches(base, registered, n=3, cutoff=0.6)  # all of TFDS would fill the screen
    raise unknown_name("dataset", name, [*built_in, *near])
  raise InputError(f"--dataset={name}: is not prepared in {data_dir}; run: {_build_command(name, data_dir)}")


def _build_command(name: str, data_dir: str) -> str:
  return f"tfds build {name} --file_format=array_record --data_dir={data_dir}"


def _features(name: str, features: Any) -> tuple[str, str | None, tuple[str, ...]]:
  """Returns (text feature, domain feature or None, domain names) of a data set."""
  import tensorflow_datasets as tfds

  texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
  if "text" not in texts and len(texts) != 1:
    right = f"needs a text feature named text, or only one; its features are {', '.join(features)}"
    raise InputError(f"--dataset={name}: {right}")
  text_feature = "text" if "text" in texts else texts[0]
  for key in ("domain", "label"):
    if key in features and isinstance(features[key], tfds.features.ClassLabel):
      return text_feature, key, tuple(features[key].names)
  return text_feature, None, (name,)


def _split_names(name: str, splits: Any) -> dict[str, str]:
  """Returns the TFDS splits or slices that serve as train and validation."""
  if "train" not in splits:
    raise InputError(f"--dataset={name}: has no train split; its splits are {', '.join(splits)}")
  for other in ("validation", "test"):
    if other in splits:
      return {"train": "train", "validation": other}
  return {"train": "train[:99%]", "validation": "train[99%:]"}
