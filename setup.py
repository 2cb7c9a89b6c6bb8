"""Package metadata. Tool configuration is in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "moe_jax/__init__.py").read_text(), re.MULTILINE).group(
  1
)
README = ROOT / "README.md"
# The badges and the first cells of the notebooks name the same repository. tests/test_repository.py compares them.
REPOSITORY = "https://github.com/moe-jax/moe_jax"

EXTRAS = {
  "tpu": ["jax[tpu]>=0.10"],
  "cuda13": ["jax[cuda13]>=0.10"],
  "sentencepiece": ["sentencepiece>=0.2"],
  "notebooks": ["jupyterlab>=4", "ipywidgets>=8", "ipykernel>=6"],
  "dev": [
    "sentencepiece>=0.2",
    "pytest>=8",
    "hypothesis>=6.100",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.6",
    "ruff==0.17.*",  # one minor version: the format may differ in the next; same in .pre-commit-config.yaml
    "pre-commit>=4",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "ipykernel>=6",
  ],
  # What tests/parity compares with. Releases of transformers differ in details that the tests state.
  "parity": ["torch==2.13.0", "transformers>=5.23,<6"],
}

setup(
  name="moe_jax",
  version=VERSION,
  description="Mixture-of-Experts language models in JAX and Flax",
  long_description=README.read_text() if README.exists() else "",
  long_description_content_type="text/markdown",
  author="The moe_jax authors",
  url=REPOSITORY,
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["moe_jax", "moe_jax.*"]),
  package_data={"moe_jax.analysis.examine": ["templates/*"], "moe_jax.comparison.report": ["templates/*"]},
  install_requires=[
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "numpy>=2.0",
    "ml_dtypes>=0.5",
    "absl-py>=2.1",
    "grain>=0.2.12",
    "tensorflow-datasets>=4.9",
    "tokenizers>=0.20",
    "scipy>=1.13",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "rich>=13",
    "tensorboardX>=2.6",
  ],
  extras_require=EXTRAS,
)
