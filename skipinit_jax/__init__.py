"""SkipInit in JAX and Flax: deep residual networks without normalization.

`SkipInit`, `SkipInitConv` and `SkipInitDense` end a residual branch in a
scalar; `WideResNet`, `ResNet` and `ResNet18` to `ResNet200` are networks of
such branches. The same for NNX: `skipinit_jax.models.nnx`.
"""

from skipinit_jax import cli  # noqa: F401  Before JAX, which is slow.
from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  Join,
  ResNet,
  ResNet18,
  ResNet34,
  ResNet50,
  ResNet101,
  ResNet152,
  ResNet200,
  SkipInit,
  SkipInitConv,
  SkipInitDense,
  WideResNet,
  alphas,
  decay_mask,
  fixup_kernel_init,
  fold,
  fold_params,
  load_body,
  param_labels,
  stage_outputs,
)
from skipinit_jax.pretrained import load_pretrained
from skipinit_jax.version import __version__

__all__ = [
  'SkipInit',
  'SkipInitConv',
  'SkipInitDense',
  'Join',
  'WideResNet',
  'ResNet',
  'ResNet18',
  'ResNet34',
  'ResNet50',
  'ResNet101',
  'ResNet152',
  'ResNet200',
  'METHODS',
  'load_pretrained',
  'alphas',
  'decay_mask',
  'param_labels',
  'fixup_kernel_init',
  'fold',
  'fold_params',
  'load_body',
  'stage_outputs',
  'InputError',
  '__version__',
]
