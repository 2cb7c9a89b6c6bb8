"""The standard-library corpus: a small made-up library, then this interpreter's own."""

import errno
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from moe_jax.data import load_dataset, stdlib_text
from moe_jax.data.stdlib_text import read_documents, split_docstrings
from moe_jax.errors import InputError
from tests.data.helpers import config, join_rows, write_files, write_library

REPOSITORY = Path(__file__).parents[2]
builder = pytest.importorskip("moe_jax.data.stdlib_builder")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  return write_library(tmp_path_factory.mktemp("lib"))


def test_docstrings_are_split_from_code():
  source = '"""One."""\nimport os\nclass A:\n  """Two\n\n  lines."""\n  def f(self):\n    "three"\n    return "no doc"\n'
  code, docstrings = split_docstrings(source)
  assert code == 'import os\nclass A:\n  def f(self):\n    return "no doc"\n'
  assert docstrings == ["One.", "Two\n\n  lines.", "three"]
  assert split_docstrings("not python at all (") == ("not python at all (", [])
  assert split_docstrings("x = 1\n") == ("x = 1\n", [])


def test_every_text_has_its_domain_and_one_split(library):
  documents = read_documents(library, min_bytes=1)
  text = {d: "\n".join(x.text for x in documents if x.domain == d) for d in stdlib_text.DOMAINS}
  for i in range(20):
    assert len(re.findall(rf"def f{i}\(\)", text["code"])) == 1
    assert len(re.findall(rf"More prose {i}\.", text["prose"])) == 1
    assert len(re.findall(rf"def test_{i}\(\)", text["tests"])) == 1
    assert len(re.findall(rf"add{i} add", text["numbers"])) == 1
  assert "Topic one" in text["prose"] and "# a comment" in text["code"] and '"""' not in text["code"]
  assert "codecs" not in text["tables"] and text["tables"].count("decoding_table") == 20
  everything = "".join(text.values())
  assert "SITE" not in everything and "BUILD" not in everything and "comment\nadd" not in everything
  for domain in stdlib_text.DOMAINS:
    sizes = {
      s: sum(len(x.text) for x in documents if (x.domain, x.split) == (domain, s))
      for s in ("train", "validation")
    }
    # at least the fraction, and at most one text more, of which this small library has twenty a domain
    share = sizes["validation"] / sum(sizes.values())
    assert stdlib_text.VALIDATION_FRACTION <= share < stdlib_text.VALIDATION_FRACTION + 0.1


def test_the_texts_whose_paths_have_the_lowest_hashes_are_for_validation(library):
  names = {
    "code": ("module{}.py", "def f{}()"),
    "tests": ("test/test_{}.py", "def test_{}()"),
    "tables": ("encodings/cp{}.py", "  {},\n"),
    "numbers": ("test/decimaltestdata/n{}.decTest", "add{} add"),
  }
  documents = read_documents(library, min_bytes=1)
  for domain, (path, mark) in names.items():
    (text,) = (d.text for d in documents if (d.domain, d.split) == (domain, "validation"))
    held = {i for i in range(20) if mark.format(i) in text}
    by_hash = sorted(range(20), key=lambda i: sha256(path.format(i).encode()).hexdigest())
    assert held == set(by_hash[: len(held)]) and 0 < len(held) < 4, domain


def test_test_files_are_tests_wherever_they_lie(tmp_path):
  tests = [
    "test/a.py",
    "test/deep/b.py",
    "pkg/tests/c.py",
    "lib/idle_test/d.py",
    "pkg/test_e.py",
    "test_f.py",
  ]
  others = ["contest/g.py", "pkg/latest/h.py", "pkg/testing.py", "unittest/case.py", "attest_i.py"]
  files = {path: f'"""Of {path}."""\nhere = "{path}"\n' for path in tests + others}
  write_files(tmp_path, files | {"pkg/tests/README.txt": "READ"})
  text = dict.fromkeys(("tests", "code", "prose"), "")
  for document in read_documents(tmp_path, min_bytes=1):
    text[document.domain] += document.text
  for path, source in files.items():
    found = (source in text["tests"], f'here = "{path}"' in text["code"], path in text["prose"])
    assert found == ((True, False, False) if path in tests else (False, True, True)), path
  assert "READ" not in "".join(text.values())


def test_short_texts_are_joined_and_long_ones_cut():
  long = "".join(f"line {i}\n" for i in range(10_000))
  start = stdlib_text._beginning(long)
  assert long.startswith(start) and start.endswith("\n") and 0 <= stdlib_text.FILE_BYTES - len(start) < 20
  joined = stdlib_text._join_short(["x" * 9_000, "y" * 9_000, "z"])
  assert [len(d) for d in joined] == [18_002, 1]


def test_domains_are_capped_and_small_ones_left_out(library):
  full = read_documents(library, min_bytes=1)
  capped = read_documents(library, domain_bytes=200, min_bytes=1)
  assert sum(len(d.text) for d in capped) < sum(len(d.text) for d in full) / 2
  assert {d.domain for d in read_documents(library, min_bytes=700)} < set(stdlib_text.DOMAINS)


def test_without_the_test_package(tmp_path):
  root = write_library(tmp_path)
  for path in sorted((root / "test").rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  assert {d.domain for d in read_documents(root, min_bytes=1)} == {"code", "prose", "tables"}


def test_concurrent_builds_and_the_cache(library, tmp_path, capfd):
  build = (
    "import pathlib, sys; from moe_jax.data import stdlib_text, stdlib_builder as b;"
    "stdlib_text.read_documents.__kwdefaults__.update(domain_bytes=10**6, min_bytes=1);"
    "_, domains = b.read_stdlib(*map(pathlib.Path, sys.argv[1:])); print(*domains)"
  )
  command = [sys.executable, "-c", build, str(tmp_path), str(library)]
  runs = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=REPOSITORY) for _ in range(2)]
  outputs = [run.communicate() for run in runs]
  assert [out for out, _ in outputs] == [" ".join(stdlib_text.DOMAINS) + "\n"] * 2, outputs
  assert [p.name[:3] for p in (tmp_path / "stdlib").iterdir()] == ["v1."]  # one build, no scratch folder left
  capfd.readouterr()
  splits, domains = builder.read_stdlib(tmp_path, library)
  assert "building" not in capfd.readouterr().err
  assert domains == stdlib_text.DOMAINS
  expected = {(d.text, d.domain, d.split) for d in read_documents(library, domain_bytes=10**6, min_bytes=1)}
  assert {(t, domains[i], s) for s, texts in splits.items() for t, i in texts} == expected
  (library / "new.py").write_text("y = 2\n")
  try:
    assert builder._cache_key(library) not in [p.name for p in (tmp_path / "stdlib").iterdir()]
  finally:
    (library / "new.py").unlink()


def test_a_damaged_corpus_is_built_again(library, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(read_documents.__kwdefaults__, "min_bytes", 1)
  expected = builder.read_stdlib(tmp_path, library)
  (folder,) = (tmp_path / "stdlib").iterdir()
  damages = {
    "*train.array_record*": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "dataset_info.json": lambda path: path.write_text("null"),
    "features.json": lambda path: path.unlink(),
    "digest.txt": lambda path: path.write_text("0" * 64),
  }
  for count, (name, damage) in enumerate(damages.items(), start=1):
    (path,) = folder.glob(name)
    damage(path)
    capsys.readouterr()
    assert builder.read_stdlib(tmp_path, library) == expected, name
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "is damaged" in notes[0] and "built again" in notes[0]
    assert len(list((tmp_path / "stdlib/damaged").iterdir())) == count
  (tmp_path / "stdlib/damaged").rename(tmp_path / "stdlib/before")
  (tmp_path / "stdlib/damaged").write_text("a file")
  (folder / "digest.txt").write_text("0" * 64)
  with pytest.raises(InputError, match=rf"^{folder}: is damaged \(ValueError.*\), and cannot be moved to"):
    builder.read_stdlib(tmp_path, library)
  assert (folder / "digest.txt").read_text() == "0" * 64


def test_a_corpus_that_cannot_be_read_now_stays_where_it_is(library, tmp_path, monkeypatch):
  monkeypatch.setitem(read_documents.__kwdefaults__, "min_bytes", 1)
  expected = builder.read_stdlib(tmp_path, library)
  (folder,) = (tmp_path / "stdlib").iterdir()

  def read(*args):
    raise OSError(errno.EIO, "Input/output error")

  with monkeypatch.context() as patch:
    patch.setattr(builder, "_read", read)
    with pytest.raises(
      InputError, match=r"cannot be read now \(OSError: .*Input/output error\), which does not"
    ):
      builder.read_stdlib(tmp_path, library)
  assert list((tmp_path / "stdlib").iterdir()) == [folder]
  assert builder.read_stdlib(tmp_path, library) == expected


def test_a_build_appears_whole_in_one_rename(library, tmp_path, monkeypatch):
  published = []

  def rename(source, target, plain=os.rename):
    if Path(target).parent == tmp_path / "stdlib":
      assert not Path(target).exists() and (Path(source) / "dataset_info.json").exists()
      published.append(Path(target))
      plain(source, target)  # another process is first ...
      raise OSError("Directory not empty")  # ... so this one fails
    return plain(source, target)

  monkeypatch.setattr(os, "rename", rename)
  monkeypatch.setattr(stdlib_text, "FILE_BYTES", 30)
  monkeypatch.setitem(read_documents.__kwdefaults__, "min_bytes", 1)
  splits, _ = builder.read_stdlib(tmp_path, library)
  assert splits["train"] and published == list((tmp_path / "stdlib").iterdir())


def test_data_dir_that_is_a_file(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match=r"^--data_dir=.*file: must be a folder that can be written"):
    load_dataset(config(data_dir=str(tmp_path / "file")))


@pytest.fixture(scope="module")
def real():
  return load_dataset(
    config(dataset="stdlib", sequence_length=256)
  )  # in $MOE_JAX_DATA_DIR, shared by all tests


def test_the_real_library(real):
  info = real.info
  assert {"code", "prose", "tables"} <= set(info.domains) and info.vocab_size == 264
  train, validation = (np.array(info.targets_per_domain[s]) for s in ("train", "validation"))
  assert train.min() > 50_000 and train.sum() + validation.sum() < 8_500_000
  fraction = validation / (train + validation)
  # the fraction is counted in bytes of whole files: up to one file more, joins and ends aside
  assert fraction.min() > 0.95 * stdlib_text.VALIDATION_FRACTION
  assert fraction.max() < 1.5 * stdlib_text.VALIDATION_FRACTION
  assert max(info.padded_fraction.values()) < 0.02
  assert len(info.fingerprint) == 64
  # the domain mix of the beginning of training and of validation is that of the whole
  share = train / train.sum()
  for batch in (
    join_rows([next(it) for it in [real.train_batches()] for _ in range(100)]),
    join_rows(list(real.validation_batches(64, limit=6))),
  ):
    seen = np.bincount(batch["domain_B"], minlength=len(share)) / len(batch["domain_B"])
    np.testing.assert_allclose(seen, share, atol=0.1)


def test_domains_hold_what_they_say(real):
  batch = join_rows(list(real.validation_batches(64, limit=20)))
  samples = {}
  for tokens, domain in zip(batch["tokens_BL"], batch["domain_B"], strict=True):
    samples[real.info.domains[domain]] = samples.get(real.info.domains[domain], "") + "".join(
      chr(t) for t in tokens if t < 256
    )
  assert samples["tables"].count("0x") > 10 * samples["prose"].count("0x")
  assert samples["code"].count("self.") > 2 * samples["prose"].count("self.")
  assert samples["prose"].count(" the ") > 2 * samples["code"].count(" the ")
