"""Pages in Chromium, with no network."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
  filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'chrome'))),
  None,
)
needs_chromium = pytest.mark.skipif(
  CHROMIUM is None, reason='there is no Chromium'
)
PHONE = 390  # Pixels of its width.


def chromium(*arguments: str) -> subprocess.CompletedProcess:
  command = [
    CHROMIUM,
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--host-resolver-rules=MAP * ~NOTFOUND',
    '--allow-file-access-from-files',
    '--enable-logging=stderr',
    '--virtual-time-budget=5000',
    '--dump-dom',
  ]
  return subprocess.run(
    [*command, *arguments],
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  )


def probe(html: str, folder: Path, script: str, width: int, *flags: str):
  """What a script in a page posts to its parent, as JSON.

  The page is in a frame of that width, since a window of Chromium has at least
  500 pixels. It may load files of `folder` by relative paths.
  """
  page, frame = folder / 'probed.html', folder / 'frame.html'
  page.write_text(html.replace('</body>', f'<script>{script}</script></body>'))
  frame.write_text(
    f'<iframe width="{width}" height="844" src="{page.name}"></iframe>'
    '<script>onmessage = (event) => {'
    'document.body.innerHTML = "<pre></pre>";'
    'document.querySelector("pre").textContent = event.data}</script>'
  )
  try:
    done = chromium(*flags, frame.as_uri())
  finally:
    page.unlink()
    frame.unlink()
  assert 'ERR_NAME_NOT_RESOLVED' not in done.stderr
  return json.loads(re.search('<pre>(.*)</pre>', done.stdout)[1])
