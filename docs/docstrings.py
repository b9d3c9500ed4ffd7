"""Docstrings as Markdown: examples and indented lines stay as written."""

import re

import griffe


class AsWritten(griffe.Extension):
  """Makes code of `>>>` examples and of paragraphs that are indented."""

  def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
    """Changes the docstring of `obj`, before it is parsed."""
    if obj.docstring:
      obj.docstring.value = as_written(obj.docstring.value)


def as_written(text: str) -> str:
  """Indents such paragraphs so far that Markdown shows them as code.

  Args:
    text: a docstring; its sections, as this one, stay as they are.
  """
  paragraphs = re.split(r'\n{2,}', text)
  shown = []
  for paragraph in paragraphs:
    if paragraph.startswith('>>> '):
      paragraph = f'```pycon\n{paragraph}\n```'
    elif paragraph.startswith('  '):
      paragraph = re.sub('^', '    ', paragraph, flags=re.MULTILINE)
    shown.append(paragraph)
  return '\n\n'.join(shown)
