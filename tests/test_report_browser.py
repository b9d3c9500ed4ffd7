"""The report in Chromium, with no network."""

import pytest
from browser import PHONE, chromium, needs_chromium, probe
from studies import make_grid, make_study, write_runs

from skipinit_jax.experiments.report import write_report

pytestmark = needs_chromium
# Goes through a copy of the page, whose policy then allows this one script.
PROBE = """
addEventListener('load', async () => {
  const style = getComputedStyle(document.body);
  const box = (e) => e.getBoundingClientRect();
  const link = document.querySelector('td a');
  location.hash = link.getAttribute('href');
  await new Promise((resolve) => setTimeout(resolve, 300));
  const rgb = (color) => color.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const tick = document.querySelector('svg text');
  const result = {
    wide: document.documentElement.scrollWidth
      - document.documentElement.clientWidth,
    svgs: [...document.querySelectorAll('svg')].map((e) => [
      box(e).width, box(e).height, e.querySelectorAll('path').length]),
    dead: [...document.querySelectorAll('a[href^="#"]')].filter((a) =>
      !document.querySelector(a.getAttribute('href'))).length,
    opened: document.querySelector(link.getAttribute('href'))
      .closest('details').open,
    folded: ['.latex', ':not(.latex)'].map((kind) => document
      .querySelectorAll(`main section > details${kind}:not([open])`).length),
    regions: [...document.querySelectorAll('.scroll')].every((e) =>
      e.tabIndex === 0 && e.getAttribute('aria-label')),
    loaded: performance.getEntriesByType('resource').map((e) => e.name),
    text: rgb(style.color), page: rgb(style.backgroundColor),
    link: rgb(getComputedStyle(link).color),
    soft: rgb(getComputedStyle(document.querySelector('td small')).color),
    tick: rgb(getComputedStyle(tick).fill),
  };
  parent.postMessage(JSON.stringify(result), '*');
});
"""


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('study')
  grid = make_grid()
  write_runs(workdir, grid)
  return write_report(make_study(grid), grid, 'cifar10', workdir)


def look(report, width, *flags):
  """What PROBE finds in a frame of that width."""
  text = report.read_text()
  assert text.count("default-src 'none'") == 1
  text = text.replace("default-src 'none'", "script-src 'unsafe-inline'")
  return probe(text, report.parent, PROBE, width, *flags)


@pytest.fixture(scope='module')
def found(report):
  return look(report, PHONE)


def test_figures_are_there(found):
  assert len(found['svgs']) == 6
  for width, height, paths in found['svgs']:
    assert width > 300
    assert height > 200
    assert paths > 10


def test_a_phone_scrolls_tables_and_not_the_page(found):
  assert found['wide'] <= 0
  assert found['regions']


def test_links_lead_somewhere_and_unfold_the_runs(found):
  assert found['dead'] == 0
  assert found['opened']
  # Of each table its LaTeX; of each of the six cells its runs, less one.
  assert found['folded'] == [3, 5]


def test_nothing_is_loaded_and_the_policy_is_kept(report, found):
  assert found['loaded'] == []
  done = chromium(report.as_uri())
  assert '<h1>A made up study: CIFAR-10</h1>' in done.stdout
  assert 'Content Security Policy' not in done.stderr
  assert 'ERR_NAME_NOT_RESOLVED' not in done.stderr


def luminance(rgb):
  def linear(part):
    part /= 255
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

  red, green, blue = map(linear, rgb)
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_has_contrast_in_both_schemes(report, scheme):
  dark = scheme == 'dark'
  option = f'--blink-settings=preferredColorScheme={0 if dark else 1}'
  found = look(report, 1280, option)
  page = luminance(found['page'])
  assert (page < 0.1) == dark
  for name in ('text', 'link', 'soft', 'tick'):
    low, high = sorted((page, luminance(found[name])))
    assert (high + 0.05) / (low + 0.05) >= 4.5, name
