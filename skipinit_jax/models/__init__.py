"""Residual networks whose blocks start near the identity, and their parts."""

from skipinit_jax.models.blocks import FixupBlock as FixupBlock
from skipinit_jax.models.blocks import ResidualBlock as ResidualBlock
from skipinit_jax.models.methods import METHODS as METHODS
from skipinit_jax.models.methods import Method as Method
from skipinit_jax.models.methods import fixup_kernel_init as fixup_kernel_init
from skipinit_jax.models.methods import he_normal as he_normal
from skipinit_jax.models.normalization import BatchNorm as BatchNorm
from skipinit_jax.models.parameters import alphas as alphas
from skipinit_jax.models.parameters import decay_mask as decay_mask
from skipinit_jax.models.parameters import param_labels as param_labels
from skipinit_jax.models.resnet import RESNETS as RESNETS
from skipinit_jax.models.resnet import ResNet as ResNet
from skipinit_jax.models.resnet import ResNet18 as ResNet18
from skipinit_jax.models.resnet import ResNet34 as ResNet34
from skipinit_jax.models.resnet import ResNet50 as ResNet50
from skipinit_jax.models.resnet import ResNet101 as ResNet101
from skipinit_jax.models.resnet import ResNet152 as ResNet152
from skipinit_jax.models.resnet import ResNet200 as ResNet200
from skipinit_jax.models.resnet import WideResNet as WideResNet
from skipinit_jax.models.skipinit import Join as Join
from skipinit_jax.models.skipinit import SkipInit as SkipInit
from skipinit_jax.models.skipinit import SkipInitConv as SkipInitConv
from skipinit_jax.models.skipinit import SkipInitDense as SkipInitDense
from skipinit_jax.models.stages import stack_blocks as stack_blocks
from skipinit_jax.models.stages import unstack_blocks as unstack_blocks
