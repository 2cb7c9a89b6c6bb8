"""The chat template of a published tokenizer: how it writes a conversation as text.

A template is a program in Jinja's language that comes with a model. It runs in Jinja's sandbox (docs/security.md), and sees
what transformers gives it, except today's date: what a model is trained on does not depend on the day.
"""

import functools
import json
import os
import pathlib
from typing import Any

from moe_jax import disk
from moe_jax.errors import InputError

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
LONGEST = 1 << 16  # bytes of a template


class ChatTemplate:
  """Writes a prompt and its response as the turns of a user and an assistant.

  Args:
    source: the template.
    specials: the texts of special tokens that it may name, such as `eos_token`.
    where: the file, for errors.

  Raises:
    InputError: if it is no template.
  """

  def __init__(self, source: str, specials: dict[str, str] | None = None, where: str = "chat template"):
    import jinja2

    if len(source) > LONGEST:
      raise InputError(f"{where}: has {len(source)} characters; at most {LONGEST} are read")
    self.source, self.where, self._specials = source, where, dict(specials or {})
    try:
      self._template = _environment().from_string(source)
    # Nested too deeply for Jinja, for Python or for its compiler.
    except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
      raise InputError(f"{where}: is no chat template ({_first_line(error)})") from None

  def split(self, prompt: str, response: str) -> tuple[str, str]:
    """Returns the text before a response, and the response with what the template writes behind it.

    Raises:
      InputError: if the template fails, or does not write a response behind what it writes for a prompt.
    """
    user = [{"role": "user", "content": prompt}]
    before = self._written(user, add_generation_prompt=True)
    whole = self._written([*user, {"role": "assistant", "content": response}], add_generation_prompt=False)
    if not before or not whole.startswith(before) or response.strip() not in whole[len(before) :]:
      raise InputError(
        f"{self.where}: does not write a response behind a prompt; use --chat_template=false, or write the turns into the examples"
      )
    return before, whole[len(before) :]

  def _written(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    given = {"messages": messages, "tools": None, "documents": None}
    try:
      return self._template.render(**given, add_generation_prompt=add_generation_prompt, **self._specials)
    except Exception as error:  # a template may fail in any way that an expression can
      raise InputError(f"{self.where}: fails on a prompt with a response ({_first_line(error)})") from None


@functools.cache
def _environment() -> Any:
  """Jinja's sandbox with what transformers adds to it."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant writes. It changes no text."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _refuse
  return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def read_chat_template(folder: str | os.PathLike[str]) -> ChatTemplate | None:
  """Returns the chat template in the folder of a published model, or None if there is none.

  It is `chat_template.jinja`, or what tokenizer_config.json has as `chat_template`; of several by name, `default`.

  Raises:
    InputError: if a file cannot be read or holds no template.
  """
  folder = pathlib.Path(folder)
  values = _read_config(folder / CONFIG)
  specials = _specials(values)
  file = folder / FILE
  if file.is_file():
    try:
      return ChatTemplate(file.read_text(encoding="utf-8"), specials, str(file))
    except (OSError, UnicodeDecodeError):
      raise InputError(f"{file}: cannot be read as text") from None
  found = values.get("chat_template")
  if isinstance(found, list):
    named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    found = named.get("default")
  if found is None:
    return None
  if not isinstance(found, str):
    raise InputError(f"{folder / CONFIG}: chat_template must be text, got {type(found).__name__}")
  return ChatTemplate(found, specials, str(folder / CONFIG))


def read_specials(folder: str | os.PathLike[str]) -> dict[str, str]:
  """Returns the texts of the special tokens that tokenizer_config.json in a folder names, such as `bos_token`.

  Raises:
    InputError: if the file is no JSON.
  """
  return _specials(_read_config(pathlib.Path(folder) / CONFIG))


def _specials(values: dict[str, Any]) -> dict[str, str]:
  found = {name: _text_of(value) for name, value in values.items() if name.endswith("_token")}
  return {name: text for name, text in found.items() if text is not None}


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    values = disk.parse_json(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    raise InputError(f"{path}: is no JSON") from None
  return values if isinstance(values, dict) else {}


def _text_of(value: Any) -> str | None:
  """The text of a special token, which may be an object with other fields."""
  value = value.get("content") if isinstance(value, dict) else value
  return value if isinstance(value, str) else None


def _refuse(message: str) -> None:
  raise ValueError(message)


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:120]
