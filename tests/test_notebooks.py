"""Every notebook runs from its first cell to its last, in a kernel of this interpreter, and draws something."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

nbformat = pytest.importorskip("nbformat", reason="running notebooks needs nbformat")
nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbclient")
pytest.importorskip("ipykernel", reason="running notebooks needs ipykernel")

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY = {"MOE_JAX_NOTEBOOK_STEPS": "2", "MOE_JAX_NOTEBOOK_SEEDS": "1", "MOE_JAX_NOTEBOOK_DATASET": "markov"}
KERNEL = "this_interpreter"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  """The name of a kernel that runs in this interpreter, whatever kernels the user has. The kernel inherits
  the environment: the tests' compilation cache, compiler flags, data folder and CPU, but a single device."""
  spec = {
    "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
    "display_name": KERNEL,
    "language": "python",
  }
  folder = tmp_path / "jupyter" / "kernels" / KERNEL
  folder.mkdir(parents=True)
  (folder / "kernel.json").write_text(json.dumps(spec))
  monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
  one_device = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  monkeypatch.setenv("XLA_FLAGS", " ".join(one_device))
  monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws inline
  for name, value in TINY.items():
    monkeypatch.setenv(name, value)
  return KERNEL


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_the_package_and_keeps_jax(path, monkeypatch):
  first = next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
  calls = []

  def run(command, **_):
    keep = pathlib.Path(command[command.index("--constraint") + 1]).read_text().splitlines()
    calls.append((command[-1], keep))
    return subprocess.CompletedProcess(command, len(calls) - 1, "", "jax is too old")

  monkeypatch.setattr(subprocess, "run", run)
  exec(first, {})  # the package is there: nothing to install
  assert calls == []
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  exec(first, {})
  [(source, keep)] = calls
  assert source.startswith("git+https://")
  assert {f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib")} <= set(keep)
  with pytest.raises(SystemExit, match="jax is too old"):
    exec(first, {})  # where pip fails, its reason is shown


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, kernel, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  client = nbclient.NotebookClient(
    notebook, kernel_name=kernel, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
  )
  client.execute()  # raises CellExecutionError with the traceback of the cell
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  assert not [output for output in outputs if output.output_type == "error"]
  figures = [output for output in outputs if "image/png" in output.get("data", {})]
  assert len(figures) >= 2
