import dataclasses
import os
import re
from hashlib import sha256

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data.text_folder import check_outside, read_text_folder
from moe_jax.errors import InputError
from tests.data.helpers import folder_dataset, write_files


def test_domains_are_subfolders_and_files_go_whole_to_one_split(tmp_path):
  files = {f"{d}/{'deep/' * (i % 2)}{i}.txt": f"{d} {i}\n" for d in ("news", "code") for i in range(30)}
  folder = write_files(
    tmp_path / "corpus", {**files, "top.txt": "t\n" * 20, ".git/x": "no", "code/empty": " "}
  )
  splits, domains = read_text_folder(str(folder))
  assert domains == ("code", "corpus", "news")
  texts = {s: {(t, domains[d]) for t, d in documents} for s, documents in splits.items()}
  assert not texts["train"] & texts["validation"]
  assert {t for t, d in texts["train"] | texts["validation"] if d != "corpus"} == set(files.values())
  assert all(t.startswith(d) for s in texts.values() for t, d in s if d != "corpus")
  for domain in ("news", "code"):  # a tenth of the files, those whose paths have the lowest hashes
    paths = sorted((p for p in files if p.startswith(domain)), key=lambda p: sha256(p.encode()).hexdigest())
    assert {t for t, d in texts["validation"] if d == domain} == {files[path] for path in paths[:3]}
  # a domain of one file is cut at a line
  pieces = {s: [t for t, d in texts[s] if d == "corpus"] for s in texts}
  assert pieces["train"][0] + pieces["validation"][0] == "t\n" * 20 and len(pieces["validation"][0]) in (2, 4)
  assert read_text_folder(str(folder)) == (splits, domains)


def test_a_domain_of_one_file_has_training_text_however_long_its_lines_are(tmp_path):
  files = {"a/one.txt": "x" * 1000, "b/one.txt": "y\n" + "x" * 1000, "c/one.txt": "line\n" * 200}
  splits, domains = read_text_folder(str(write_files(tmp_path, files)))
  size = lambda split, domain: sum(len(text) for text, i in splits[split] if domains[i] == domain)
  assert {d: (size("train", d), size("validation", d)) for d in domains} == {
    "a": (900, 100), "b": (901, 101), "c": (900, 100)}  # fmt: skip


def test_the_name_of_the_folder_is_in_the_fingerprint_only_as_the_domain_of_files_at_its_top(tmp_path):
  """As reliability.md and the line say with which other text is refused. The place never is."""
  top, below = {f"{i}": f"{i}" * 40 for i in range(4)}, {f"a/{i}": f"{i}" * 40 for i in range(4)}
  found = lambda name, files: folder_dataset(write_files(tmp_path / name, files)).info.fingerprint
  assert found("here/texts", top) == found("there/texts", top) != found("here/renamed", top)
  assert found("here/deep", below) == found("here/renamed_deep", below)


def test_what_is_written_must_not_become_text(tmp_path, monkeypatch):
  """Else the first start works, and the second is refused, because it has other text: the files of the first."""
  write_files(tmp_path / "texts", {"a/1": "abc"})
  (tmp_path / "link").symlink_to(tmp_path / "texts" / "a")
  monkeypatch.chdir(tmp_path)
  data = DataConfig(dataset="text_folder", text_folder="texts")
  for inside in ("texts", "texts/out", "texts/a/../b/c", tmp_path / "texts" / "out", "link/out"):
    line = f"{inside}: is in the folder of the text, --text_folder=texts, so its files would become text; choose another"
    with pytest.raises(InputError, match=re.escape(line)):
      check_outside(inside, data)
  for outside in ("out", ".", "texts_2", "texts/.out/run", "texts/../out"):  # a hidden file is no text
    check_outside(outside, data)
  check_outside("texts/out", dataclasses.replace(data, dataset="stdlib"))
  check_outside("none/out", dataclasses.replace(data, text_folder="none"))
  with pytest.raises(InputError, match=r"is in the folder of the text, --text_folder=link/\., so"):
    check_outside(tmp_path / "texts/a", dataclasses.replace(data, text_folder="link/."))


def test_splits_do_not_depend_on_other_domains(tmp_path):
  write_files(tmp_path, {f"a/{i}": f"a {i}" for i in range(20)})
  before = {t for t, _ in read_text_folder(str(tmp_path))[0]["validation"]}
  write_files(tmp_path, {f"b/{i}": f"b {i}" for i in range(20)})
  after = {t for t, _ in read_text_folder(str(tmp_path))[0]["validation"] if t.startswith("a")}
  assert before == after


def test_equal_documents_are_in_the_split_of_the_first(tmp_path, capsys):
  """Also with other newlines or a byte order mark, and in another domain."""
  files = {f"{d}/{i}.txt": f"{d} {i}\nend\n" for d in "ab" for i in range(30)}
  folder = write_files(tmp_path / "texts", files)
  alone = read_text_folder(str(folder))[0]
  assert capsys.readouterr().err == ""
  for name in files:
    data = (folder / name).read_bytes()
    (folder / f"{name}.copy").write_bytes(data.replace(b"\n", b"\r\n"))
  (folder / "c").mkdir()
  for i in range(30):
    (folder / f"c/{i}.txt").write_bytes(b"\xef\xbb\xbf" + files[f"a/{i}.txt"].encode())
  splits, domains = read_text_folder(str(folder))
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "90 of 150 files are copies of another one" in said
  assert domains == ("a", "b", "c")
  for split, before in alone.items():
    texts = [text for text, _ in before]
    in_c = [text for text in texts if text.startswith("a")]
    assert sorted(text for text, _ in splits[split]) == sorted(2 * texts + in_c)
    assert {text for text, i in splits[split] if domains[i] == "c"} == set(in_c)


def test_a_domain_of_equal_documents_is_one_document(tmp_path):
  files = {f"{i}.txt": "line\n" * 20 for i in range(10)} | {"deep/er.txt": "line\n" * 20}
  splits, _ = read_text_folder(str(write_files(tmp_path / "texts", files)))
  assert [text for text, _ in splits["train"]] == ["line\n" * 18] * 11
  assert [text for text, _ in splits["validation"]] == ["line\n" * 2] * 11


def test_copies_do_not_make_noise_predictable(tmp_path):
  """The entropy of base64 is 6 bits."""
  noise = np.random.default_rng(0).integers(64, size=(5, 2000))
  letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"))
  texts = ["".join(letters[row]) for row in noise]
  files = {f"{name}_{i}.txt": text for i, text in enumerate(texts) for name in ("f", "copy")}
  dataset = folder_dataset(write_files(tmp_path, files), data_dir=str(tmp_path / ".cache"))
  assert dataset.info.yardsticks["trigram"] > 6


def test_wrong_bytes_are_replaced_with_a_line(tmp_path, capsys):
  for name in ("a", "b"):
    (tmp_path / name).write_bytes(b"%s \xff\xfe " % name.encode() * 30)
  (tmp_path / "c").write_bytes("right \ufffd ".encode() * 30)
  splits, _ = read_text_folder(str(tmp_path))
  texts = {text for texts in splits.values() for text, _ in texts}
  assert texts == {"a \ufffd\ufffd " * 30, "b \ufffd\ufffd " * 30, "right \ufffd " * 30}
  said = capsys.readouterr().err
  assert (
    said.count("\n") == 1
    and f"2 files are not utf-8, and wrong bytes read as U+FFFD, such as {tmp_path}/a" in said
  )


def test_a_byte_order_mark_is_no_text(tmp_path):
  (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + b"text " * 30)
  (tmp_path / "b").write_bytes(b"\xef\xbb\xbf")
  splits, _ = read_text_folder(str(tmp_path))
  assert splits["train"][0].text + splits["validation"][0].text == "text " * 30


def test_what_is_no_text_is_skipped_with_a_line(tmp_path, capsys):
  """A pipe is not waited for. Names need not be utf-8, and links to folders are domains."""
  folder = write_files(tmp_path / "texts", {f"a/{i}": f"a {i}" for i in range(5)})
  (folder / "a/image.png").write_bytes(b"\x89PNG\0\0\1")
  os.mkfifo(folder / "a/pipe")
  (folder / os.fsdecode(b"caf\xe9")).mkdir()
  (folder / os.fsdecode(b"caf\xe9/\xff")).write_text("one\ntwo\n" * 20)
  (folder / "linked").symlink_to(write_files(tmp_path / "elsewhere", {"x": "x\n" * 20}))
  splits, domains = read_text_folder(str(folder))
  assert domains == ("a", "caf\\xe9", "linked")
  assert sum(len(texts) for texts in splits.values()) == 5 + 2 + 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "2 files are no text and skipped, such as" in said and "image.png" in said


def test_nothing_that_cannot_be_read_is_left_out_without_a_word(tmp_path, monkeypatch):
  folder = write_files(tmp_path / "texts", {f"{d}/{i}": f"{d} {i}" for d in "ab" for i in range(5)})

  def refused(message):
    with pytest.raises(InputError, match=message) as error:
      read_text_folder(str(folder))
    assert "\n" not in str(error.value)

  for link, target in (("circle", "circle"), ("b/up", ".."), ("nowhere", "not/there")):
    (folder / link).symlink_to(target)
    refused(rf"{re.escape(str(folder / link))}.* (link in a circle|cannot be read)")
    (folder / link).unlink()

  def denied(of, plain):  # the tests may run as root, who may read everything
    def function(path, *arguments):
      if "texts/b" in str(path):
        raise PermissionError(13, "Permission denied")
      return plain(path, *arguments)

    monkeypatch.setattr(*of, function)

  with monkeypatch.context():
    denied((os, "listdir"), os.listdir)
    refused(r"texts/b cannot be read \(Permission denied\)")
  monkeypatch.undo()
  denied((type(folder), "read_bytes"), type(folder).read_bytes)
  refused(r"texts/b/0 cannot be read \(Permission denied\)")


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (None, "no such folder"),
    ({}, "holds no text"),
    ({"a": "  \n"}, "holds no text"),
    ({"a": "one line"}, "too little text for one"),
    ({"a": "short", "b": "text " * 50}, "too little text for one"),
    ({"a": "short", "b": "short"}, "too little text for one"),
  ],
)
def test_input_errors(tmp_path, files, message):
  folder = tmp_path / "x"
  if files is not None:
    folder.mkdir()
    write_files(folder, files)
  with pytest.raises(InputError, match=rf"^--text_folder={re.escape(str(folder))}: .*{message}") as error:
    folder_dataset(folder)
  assert "\n" not in str(error.value)


def test_flag_not_given():
  with pytest.raises(InputError, match=r"^--text_folder=: no such folder"):
    folder_dataset("")
