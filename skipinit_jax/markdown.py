"""Markdown, written."""

import html
import re
from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str]]) -> str:
  """A table, its first row the head; every line ends in a newline.

  >>> print(table([['depth', 'error'], ['16', '0.07']]), end='')
  | depth | error |
  | --- | --- |
  | 16 | 0.07 |
  """
  head, *body = rows
  lines = [head, ['---'] * len(head), *body]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def escape(text: str) -> str:
  """Text that Markdown, and the HTML made of it, take as it is.

  >>> print(escape('a|b <i>'))
  a\\|b &lt;i&gt;
  """
  text = html.escape(text.replace('\n', ' '), quote=False)
  return re.sub(r'([\\`*_\[\]|#])', r'\\\1', text)
