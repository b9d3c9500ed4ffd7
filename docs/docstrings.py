"""Docstrings as Markdown: examples and indented lines are shown verbatim."""

import re

import griffe


class AsWritten(griffe.Extension):
  """Turns `>>>` examples and indented paragraphs into code blocks."""

  def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
    """Rewrites the docstring of `obj` before it is parsed."""
    if obj.docstring:
      obj.docstring.value = as_written(obj.docstring.value)


def as_written(text: str) -> str:
  """Fences examples, and indents other code enough for Markdown.

  Args:
    text: a docstring; sections such as this one are left alone.
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
