"""SkipInit in JAX and Flax: deep residual networks without normalization."""

from skipinit_jax import cli  # noqa: F401  Before JAX, which is slow.
from skipinit_jax.models import METHODS as METHODS
from skipinit_jax.models import Join as Join
from skipinit_jax.models import ResNet as ResNet
from skipinit_jax.models import ResNet18 as ResNet18
from skipinit_jax.models import ResNet34 as ResNet34
from skipinit_jax.models import ResNet50 as ResNet50
from skipinit_jax.models import ResNet101 as ResNet101
from skipinit_jax.models import ResNet152 as ResNet152
from skipinit_jax.models import ResNet200 as ResNet200
from skipinit_jax.models import SkipInit as SkipInit
from skipinit_jax.models import SkipInitConv as SkipInitConv
from skipinit_jax.models import SkipInitDense as SkipInitDense
from skipinit_jax.models import WideResNet as WideResNet
from skipinit_jax.models import decay_mask as decay_mask
from skipinit_jax.models import fixup_kernel_init as fixup_kernel_init
from skipinit_jax.models import fold as fold
from skipinit_jax.models import fold_params as fold_params
from skipinit_jax.models import load_body as load_body
from skipinit_jax.models import param_labels as param_labels
from skipinit_jax.models import stage_outputs as stage_outputs
from skipinit_jax.pretrained import load_pretrained as load_pretrained
from skipinit_jax.version import __version__ as __version__
