"""The modules, from a wheel, with each Python and the oldest and newest JAX.

  python -m benchmarks.versions python3.11 python3.12 python3.13

For each a new environment gets the wheel with no package but those that it asks
for, runs `examples/minimal.py` away from the checkout, and is timed: what
`import skipinit_jax` adds to `import jax, flax.linen, optax`, in processes of
their own. Writes docs/versions.json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.input_pipeline import machine
from skipinit_jax import cli, markdown
from skipinit_jax.errors import InputError
from skipinit_jax.files import write_json

ROOT = Path(__file__).parents[1]
OUT = ROOT / 'docs' / 'versions.json'
OLDEST = ('jax==0.10.0', 'flax==0.12.1', 'optax==0.2.8')
CHOICES = {'oldest': OLDEST, 'newest': ()}
ROUNDS = 7
TIMED = """
import time
start = time.perf_counter()
import jax, flax.linen, optax
middle = time.perf_counter()
import skipinit_jax
end = time.perf_counter()
print(middle - start, end - middle)
"""


def run(*command: str | Path, cwd: Path) -> str:
  """What a command prints; InputError with its last line if it fails."""
  try:
    done = subprocess.run(
      [*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False
    )
  except OSError as error:
    raise InputError(f'{command[0]}: {error.strerror}') from None
  if done.returncode:
    lines = (done.stderr or done.stdout).strip().splitlines() or ['']
    raise InputError(f'{command[0]} {command[1]}: {lines[-1]}')
  return done.stdout


def measure(python: str, wanted: tuple[str, ...], wheel: Path) -> dict:
  """One environment: what it holds, and what it takes to import."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    run(python, '-m', 'venv', 'env', cwd=folder)
    ours = folder / 'env' / 'bin' / 'python'
    run(ours, '-m', 'pip', 'install', '-q', wheel, *wanted, cwd=folder)
    listed = json.loads(
      run(ours, '-m', 'pip', 'list', '--format=json', cwd=folder)
    )
    packages = {package['name']: package['version'] for package in listed}
    example = (ROOT / 'examples' / 'minimal.py').read_text()
    said = run(ours, '-c', example, cwd=folder)
    times = [
      [float(x) for x in run(ours, '-c', TIMED, cwd=folder).split()]
      for _ in range(ROUNDS + 1)
    ][1:]  # The first one compiles to bytecode and fills the disk's cache.
    version = run(ours, '-c', 'import sys; print(sys.version)', cwd=folder)
  return {
    'python': version.split()[0],
    **{name: packages[name] for name in ('jax', 'flax', 'optax', 'numpy')},
    'example': said.strip(),
    'seconds': {
      name: [round(row[i], 3) for row in times]
      for i, name in enumerate(('jax, flax and optax', 'skipinit_jax'))
    },
  }


def table(found: dict) -> str:
  """Of docs/library.md: medians, and the least and the most."""

  def spread(values: list[float]) -> str:
    middle = statistics.median(values)
    return f'{middle:.2f} ({min(values):.2f} to {max(values):.2f})'

  head = ['Python', 'JAX', 'Flax', 'Optax', 'import of these, s', 'ours, s']
  rows = [
    [
      *(e[name] for name in ('python', 'jax', 'flax', 'optax')),
      *map(spread, e['seconds'].values()),
    ]
    for e in found['environments']
  ]
  return markdown.table([head, *rows])


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('pythons', nargs='+', metavar='PYTHON')
  args = parser.parse_args()
  with cli.errors_in_one_line(), tempfile.TemporaryDirectory() as temporary:
    built = (sys.executable, '-m', 'build', '--outdir', temporary)
    run(*built, '--no-isolation', cwd=ROOT)
    wheel = next(Path(temporary).glob('*.whl'))
    environments = []
    for python in args.pythons:
      for name, wanted in CHOICES.items():
        print(f'{python}, {name} JAX', file=sys.stderr)
        environments.append(measure(python, wanted, wheel))
    found = {
      'command': ' '.join(
        ['python', '-m', 'benchmarks.versions', *sys.argv[1:]]
      ),
      'machine': machine(),
      'environments': environments,
    }
    write_json(OUT, found)
    print(table(found), end='')


if __name__ == '__main__':
  main()
