"""README as the package's long description, which can't link to files."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REPOSITORY = 'skipinit-jax/skipinit-jax'
# As in `![alt](docs/a.png)` and `[text](docs/a.md#b)`.
LINK = re.compile(r'(!?)(\[[^\]]*\])\((?!https?:|#)([^)]+)\)')


def long_description() -> str:
  """README with its links and images at the release's tag on GitHub."""
  code = (HERE / 'skipinit_jax' / 'version.py').read_text()
  tag = 'v' + re.findall(r"__version__ = '(.+)'", code)[0]

  def absolute(match: re.Match) -> str:
    image, text, path = match.groups()
    site = (
      f'https://raw.githubusercontent.com/{REPOSITORY}/{tag}'
      if image
      else f'https://github.com/{REPOSITORY}/blob/{tag}'
    )
    return f'{image}{text}({site}/{path})'

  return LINK.sub(absolute, (HERE / 'README.md').read_text())


setup(
  long_description=long_description(),
  long_description_content_type='text/markdown',
)
