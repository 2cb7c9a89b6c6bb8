"""What every test runs under. JAX reads its settings from the environment when it is first imported, so
they are set here, as environment variables, which also reach the processes that tests start."""

import ctypes
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import signal
import time

import hypothesis
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / ".jax_cache"


def _digest(*parts: bytes) -> str:
  return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _cpu() -> bytes:
  """Identifies the instruction set: compiled code must not be read back on another kind of processor."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  except OSError:
    flags = platform.processor()
  return f"{platform.machine()} {flags}".encode()


def _data_sources() -> bytes:
  """Whatever builds the corpora: built ones are kept between runs until this changes."""
  sources = [*sorted((ROOT / "moe_jax/config").glob("*.py")), *sorted((ROOT / "moe_jax/data").rglob("*.py"))]
  return b"\0".join(path.read_bytes() for path in sources)


DATA_DIR = CACHE / f"data-{_digest(_data_sources(), platform.python_version().encode())}"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  # A shell that starts the tests in the background (`&` in a script) lets them and what they start ignore it, and some
  # tests send it.
  signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on one CPU, so that every sharded path runs on a laptop.
DEVICES = "--xla_force_host_platform_device_count=8"
# The tests compile far more than they compute, so LLVM does not optimise: it halves the time of the whole. Programs that
# are not split for several threads take a tenth less, and a quarter fewer mappings (see below). The older emitters,
# which newer compilers no longer have and do not know the flag of, take less than half of the time again. No user has
# these settings: tests/test_real_settings.py runs some tests without them.
XLA_FLAGS = [DEVICES, "--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
  XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if os.environ.get("MOE_JAX_TEST_REAL_SETTINGS") == "1":
  os.environ["XLA_FLAGS"], XLA_FLAGS = DEVICES, []
for flag in XLA_FLAGS:
  if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
# Compiled programs are kept between runs and shared by the workers; results are bit-equal either way.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / f"xla-{_digest(_cpu())}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# x_BD * y_D without saying along which axis is more often a bug than a wish.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Never the user's own data or settings.
os.environ["MOE_JAX_DATA_DIR"] = str(DATA_DIR)
os.environ["MPLCONFIGDIR"] = str(CACHE / "matplotlib")
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


# Cases of tests/test_fuzz.py: the same few every time, or many new ones with --hypothesis-profile=nightly.
_FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck)}
_FUZZ["phases"] = [
  hypothesis.Phase.explicit,
  hypothesis.Phase.generate,
]  # smaller cases take long to find, and say no more
hypothesis.settings.register_profile("few", max_examples=50, derandomize=True, **_FUZZ)
hypothesis.settings.register_profile("nightly", max_examples=500, print_blob=True, **_FUZZ)
hypothesis.settings.load_profile("few")


def pytest_configure(config: pytest.Config) -> None:
  if hasattr(config, "workerinput"):  # xdist: the controller has done this
    return
  DATA_DIR.mkdir(parents=True, exist_ok=True)
  an_hour_ago = time.time() - 3600
  for old in CACHE.glob("data-*"):
    if old != DATA_DIR and old.stat().st_mtime < an_hour_ago:
      shutil.rmtree(old, ignore_errors=True)


# Tracing makes so many objects, most of which stay, that Python's collector would take a tenth of the time.
gc.set_threshold(50_000, 20, 10)


def pytest_collection_finish() -> None:
  """Keeps what was imported from being looked through again and again."""
  gc.collect()
  gc.freeze()


def pytest_report_header() -> str:
  return f"XLA_FLAGS: {os.environ['XLA_FLAGS']}"


@pytest.fixture
def rng() -> np.random.Generator:
  """A fresh generator, the same in every test and every run."""
  return np.random.default_rng(0)


def _process_uses_much() -> bool:
  """Every compiled program takes memory and mappings of it. Linux gives a process 65,530, and past them XLA crashes.

  No module makes more than some 10,000. To forget takes seconds, and small programs that modules share are then read
  anew.
  """
  try:
    mappings = pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    resident_pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  except OSError:  # only Linux says
    return False
  return mappings > 30_000 or resident_pages * os.sysconf("SC_PAGE_SIZE") > 2.5 * 2**30


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
  """Forgets what earlier modules compiled before a worker grows large."""
  yield
  if _process_uses_much():
    import jax

    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # otherwise glibc keeps what is freed
      trim(0)
