"""Turns text into batches of token windows: TFDS data sets, offline corpora, tokenizers."""

from moe_jax.data.dataset import Dataset as Dataset
from moe_jax.data.dataset import DatasetInfo as DatasetInfo
from moe_jax.data.loading import load_dataset as load_dataset
from moe_jax.data.tokenizers import Tokenizer as Tokenizer
from moe_jax.data.tokenizers import load_tokenizer as load_tokenizer
from moe_jax.data.windows import Batch as Batch
