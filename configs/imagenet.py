"""ResNet50-V2 on ImageNet, the rows of De & Smith 2020, table 3.

  python -m skipinit_jax.data prepare imagenet2012 \
    --manual-dir ARCHIVES --data-dir DATA
  python train.py --config=configs/imagenet.py:regularized_skipinit,batch=1024 \
    --config.data.dir=DATA

After the colon: a row of ROWS, and the batch size (default: 256; the paper has
256, 1024 and 4096). Machine, time and result: not measured. Published figures:
IMAGENET in skipinit_jax/published.py. `batchnorm_dropout` was not published; it
is the control for `fixup_dropout` and `regularized_skipinit`.

Not read in the paper itself, but as commonly cited: 90 epochs, 5 of warm-up and
then cosine, momentum 0.9, L2 1e-4, 224-pixel crops. Our choices: a learning
rate of 0.1 per 256 images where the paper tuned each row, L2 on kernels only,
Dropout 0.25, no label smoothing, ghost batches of 64, alpha at 0, no averages
of the parameters (`ema_decay`).

Which Fixup: `fixup` and `fixup_dropout` follow the code that the paper's group
published later (DeepMind's `nfnets`, 2021), the closest there is to table 3:
one learning rate for all parameters, no L2 on scalars and biases, Dropout on
the pooled features before the last scalar bias. Fixup's authors give the
scalars and all biases a tenth of the rate (`optimizer.reduced_rate=True`),
decay them too and have no Dropout. In `nfnets` a block without projection adds
its first bias to the skip path too; here, as in the code of Fixup's authors, it
does not (the block's last bias can make up for it).

In all rows, `nfnets` differs from this recipe as follows: the classifier starts
at zero (here in Fixup's rows only; `model.classifier_init='zero'`), momentum is
Nesterov's (`optimizer.nesterov`), labels are smoothed by 0.1
(`label_smoothing`), convolutions start as in Haiku unless Fixup says otherwise
(a truncated normal of 1/sqrt(fan_in); here He's), and the networks without
normalization have stochastic depth, 0.1 by default (here none).
"""

from ml_collections import ConfigDict

from skipinit_jax.errors import InputError, unknown
from skipinit_jax.training.config import default_config
from skipinit_jax.variants import VARIANTS

# Row -> the fields that make it, which the study `imagenet` sets too.
ROWS = {
  key.removeprefix('imagenet:'): variant.fields
  for key, variant in VARIANTS.items()
  if key.startswith('imagenet:')
}


def get_config(argument: str = 'regularized_skipinit') -> ConfigDict:
  row, batch_size = _parse(argument)
  config = default_config()
  config.batch_size = batch_size
  config.eval_batch_size = 1024
  config.epochs = 90.0

  config.model.name = 'resnet'
  config.model.depth = 50
  config.model.statistics_group = '64'

  config.data.name = 'imagenet2012'  # Or 'tfds', 'folder'.
  config.data.dir = ''  # Where it was prepared to; for folders, of the splits.
  config.data.train_split = 'train'
  config.data.eval_split = ''  # The usual one.
  config.data.train_size = 1_281_167  # What must be there; 0: anything.
  config.data.eval_size = 50_000
  config.data.image_size = 224
  config.data.eval_resize = 256
  config.data.area = (0.08, 1.0)
  config.data.aspect = (3 / 4, 4 / 3)
  config.data.flip = True
  config.data.workers = 8  # Processes that decode, on each host.

  config.optimizer.learning_rate = 0.1
  config.optimizer.reference_batch = 256
  config.optimizer.l2 = 1e-4
  config.schedule.name = 'cosine'
  config.schedule.warmup_epochs = 5.0
  config.update_from_flattened_dict(ROWS[row])
  return config


def _parse(argument: str) -> tuple[str, int]:
  row, batch_size = 'regularized_skipinit', '256'
  for part in argument.split(','):
    name, equals, value = part.partition('=')
    if not equals:
      row = name
    elif name == 'batch':
      batch_size = value
    else:
      raise InputError(unknown('argument of this recipe', name, ['batch']))
  if row not in ROWS:
    raise InputError(unknown('row of table 3', row, ROWS))
  if not batch_size.isdecimal():
    raise InputError(f'batch={batch_size!r}: expected a number of images')
  return row, int(batch_size)
