"""ResNet50-V2 on ImageNet, the rows of De & Smith 2020, table 3.

  python -m skipinit_jax.data prepare imagenet2012 \
    --manual-dir ARCHIVES --data-dir DATA
  python train.py --config=configs/imagenet.py:regularized_skipinit,batch=1024 \
    --config.data.dir=DATA

After the colon: a row, and the batch size (256 if left out; the paper has 256,
1024 and 4096). Published top-1 % at these three:

  batchnorm             75.0  74.9  74.9
  fixup                 74.8  74.6  73.0
  skipinit              74.9  74.6  70.8   (SkipInit + Biases)
  fixup_dropout         75.8  75.6  74.8
  regularized_skipinit  75.6  75.5  72.7   (SkipInit + Biases + Dropout)
  batchnorm_dropout     not published: the control for the two rows above

Not read in the paper itself, but as commonly cited: 90 epochs, 5 of warm-up and
then cosine, momentum 0.9, L2 1e-4, 224-pixel crops. Our choices: a learning
rate of 0.1 per 256 images where the paper tuned each row, L2 on kernels only,
Dropout 0.25, no label smoothing, ghost batches of 64, SkipInit at 0. Time and
accuracy of this recipe: not measured.
"""

from ml_collections import ConfigDict

from skipinit_jax.errors import InputError, unknown
from skipinit_jax.training.config import default_config

DROPOUT = 0.25
# Row -> (method, biases on the convolutions, Dropout).
ROWS = {
  'batchnorm': ('batchnorm', False, 0.0),
  'fixup': ('fixup', False, 0.0),
  'skipinit': ('skipinit', True, 0.0),
  'fixup_dropout': ('fixup', False, DROPOUT),
  'regularized_skipinit': ('skipinit', True, DROPOUT),
  'batchnorm_dropout': ('batchnorm', False, DROPOUT),
}


def get_config(argument: str = 'regularized_skipinit') -> ConfigDict:
  row, batch_size = _parse(argument)
  config = default_config()
  config.batch_size = batch_size
  config.eval_batch_size = 1024
  config.epochs = 90.0

  config.model.name = 'resnet'
  config.model.depth = 50
  method, biases, dropout = ROWS[row]
  config.model.method = method
  config.model.biases = biases
  config.model.dropout = dropout
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
