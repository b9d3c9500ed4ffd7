"""Which parameters decay, by leaf name."""

import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toys import flatten

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  ResNet,
  WideResNet,
  alphas,
  decay_mask,
  param_labels,
  stack_blocks,
)
from skipinit_jax.models.parameters import (
  LEAVES,
  block_names,
  block_norms,
  count_parameters,
)

MODELS = {
  'wide': WideResNet(16, 2),
  'basic': ResNet((2, 1), num_classes=5, features=4),
  'bottleneck': ResNet((3, 1), True, num_classes=5, features=4),
}
PLAIN = {
  'layer': {'kernel': np.ones((2, 3)), 'bias': np.ones(3)},
  'embedding': {'table': np.ones((7, 2))},
}


@functools.cache
def params_of(model, method, **fields):
  init = functools.partial(
    model.clone(method=method, **fields).init, train=False
  )
  x = jnp.zeros((1, 16, 16, 3))
  return jax.eval_shape(init, jax.random.key(0), x)['params']


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('family', MODELS)
def test_labels_are_total_and_by_exact_leaf_name(family, method):
  params = params_of(MODELS[family], method, biases=True)
  labels = param_labels(params)
  assert jax.tree.structure(labels) == jax.tree.structure(params)
  for path, label in flatten(labels).items():
    assert path.endswith(f'/{label}')
  expected = {'kernel', 'bias'}
  expected |= {'scale'} if METHODS[method].normalize else set()
  expected |= {'alpha'} if METHODS[method].alpha is not None else set()
  expected |= {'gain'} if METHODS[method].standardize else set()
  expected |= {'scalar_bias'} if METHODS[method].scalar_biases else set()
  assert set(jax.tree.leaves(labels)) == expected


@pytest.mark.parametrize('method', METHODS)
def test_scanned_and_unrolled_networks_have_the_same_labels(method):
  def labels(scan):
    return flatten(param_labels(params_of(MODELS['wide'], method, scan=scan)))

  scanned, unrolled = labels(True), labels(False)
  assert scanned != unrolled
  renamed = {p.replace('/block2/', '/blocks/'): v for p, v in unrolled.items()}
  assert renamed == scanned


@pytest.mark.parametrize('method', METHODS)
def test_kernels_alone_decay_by_default(method):
  params = params_of(MODELS['basic'], method, biases=True)
  mask = flatten(decay_mask(params))
  assert {type(v) for v in mask.values()} == {bool}
  for path, decays in mask.items():
    assert decays == path.endswith('/kernel'), path


def test_what_decays_is_a_field():
  params = params_of(MODELS['basic'], 'fixup', biases=True)
  mask = flatten(decay_mask(params, decay=('alpha', 'scalar_bias')))
  for path, decays in mask.items():
    assert decays == path.endswith(('/alpha', '/scalar_bias')), path
  assert not any(flatten(decay_mask(params, decay=())).values())
  assert all(flatten(decay_mask(params, decay=LEAVES)).values())


def test_the_mask_is_what_optax_takes():
  params = {'conv': {'kernel': jnp.ones(2), 'alpha': jnp.ones(())}}
  l2 = optax.add_decayed_weights(0.5, decay_mask(params))
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = l2.update(zeros, l2.init(params), params)
  np.testing.assert_array_equal(updates['conv']['kernel'], [0.5, 0.5])
  assert float(updates['conv']['alpha']) == 0


@pytest.mark.parametrize('function', [param_labels, decay_mask])
def test_an_unknown_leaf_is_named_with_the_argument_that_settles_it(function):
  with pytest.raises(InputError) as error:
    function(PLAIN)
  message = str(error.value)
  assert "'embedding/table'" in message
  assert "other='decay'" in message
  assert "other='no_decay'" in message
  assert '\n' not in message
  with pytest.raises(InputError, match="other='no': expected 'decay' or"):
    function(PLAIN, other='no')
  with pytest.raises(InputError, match="other='no': expected 'decay' or"):
    function({'kernel': 0}, other='no')  # Where nothing is asked of it.


@pytest.mark.parametrize('name', ['bias_2', 'kernels', 'my_alpha', 'Kernel'])
def test_a_leaf_that_only_resembles_a_known_name_is_unknown(name):
  with pytest.raises(InputError, match=name):
    param_labels({'kernel': {name: np.ones(1)}})


@pytest.mark.parametrize('other', ['decay', 'no_decay'])
def test_other_settles_unknown_leaves_and_no_known_one(other):
  assert param_labels(PLAIN, other=other) == {
    'layer': {'kernel': 'kernel', 'bias': 'bias'},
    'embedding': {'table': other},
  }
  assert decay_mask(PLAIN, other=other) == {
    'layer': {'kernel': True, 'bias': False},
    'embedding': {'table': other == 'decay'},
  }


def test_names_of_ones_own_decay_if_they_are_named():
  embedding = {'table': np.ones(2), 'position': np.ones(2)}
  tree = {'embedding': embedding, 'out': {'kernel': np.ones(2)}}
  mask = decay_mask(tree, decay=('kernel', 'table'), other='no_decay')
  assert mask == {
    'embedding': {'table': True, 'position': False},
    'out': {'kernel': True},
  }
  assert decay_mask(tree['out'], decay='kernel') == {'kernel': True}
  with pytest.raises(InputError, match='embedding/position'):
    decay_mask(tree, decay=('kernel', 'table'))


def test_an_unknown_name_in_decay_is_refused():
  message = r"unknown leaf name in decay 'kernal'; did you mean 'kernel'\?"
  with pytest.raises(InputError, match=message):
    decay_mask({'kernel': np.ones(1)}, decay=('kernal',))


def test_counts_are_arrays_and_elements_by_name():
  assert count_parameters(PLAIN) == {
    'kernel': (1, 6),
    'bias': (1, 3),
    'no_decay': (1, 14),
  }
  # Two scalar biases in the network and four a block, an alpha a block.
  counts = count_parameters(params_of(MODELS['basic'], 'fixup'))
  assert counts['scalar_bias'] == (14, 14)
  assert counts['alpha'] == (3, 3)
  assert counts['bias'] == (1, 5)
  # A scanned stage holds its blocks' scalars in one array.
  unrolled = count_parameters(params_of(MODELS['wide'], 'skipinit'))
  scanned = count_parameters(params_of(MODELS['wide'], 'skipinit', scan=True))
  assert unrolled['alpha'] == (6, 6)
  assert scanned['alpha'] == (6, 6)
  assert {k: v[1] for k, v in scanned.items()} == {
    k: v[1] for k, v in unrolled.items()
  }
  total = sum(
    leaf.size for leaf in jax.tree.leaves(params_of(MODELS['wide'], 'skipinit'))
  )
  assert sum(elements for _, elements in unrolled.values()) == total


def test_alphas_are_in_the_order_of_the_blocks_in_both_forms():
  params = jax.tree.map(
    lambda x: np.zeros(x.shape), params_of(MODELS['wide'], 'skipinit')
  )
  numbers = iter(range(100))
  for stage in (1, 2, 3):
    blocks = params[f'stage{stage}']
    for name in sorted(blocks, key=lambda n: int(n.removeprefix('block'))):
      blocks[name]['conv2']['alpha'] = np.float32(next(numbers))
  got = alphas(params)
  assert [float(v) for v in got.values()] == [*range(len(got))]
  assert next(iter(got)) == 'stage1/block1'
  stacked = alphas(stack_blocks(params))
  assert {k: float(v) for k, v in stacked.items()} == got
  assert [*stacked] == [*got]
  # Block 10 comes after block 9.
  deep = {f'block{i}': {'out': {'alpha': np.float32(i)}} for i in range(1, 12)}
  assert [*alphas({'body': deep})] == [f'body/block{i}' for i in range(1, 12)]
  assert alphas({'dense': {'kernel': 1}}) == {}


def test_blocks_are_named_and_measured_alike_in_both_forms():
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    params_of(WideResNet(22, 1), 'skipinit'),
  )
  names = [f'stage{s}/block{b}' for s in (1, 2, 3) for b in (1, 2, 3)]
  stacked = stack_blocks(params)
  assert block_names(params) == block_names(stacked) == names
  norms = block_norms(params)
  np.testing.assert_allclose(block_norms(stacked), norms, rtol=1e-6)
  for name, norm in zip(names, norms, strict=True):
    stage, block = name.split('/')
    flat = np.concatenate(
      [np.ravel(leaf) for leaf in jax.tree.leaves(params[stage][block])]
    )
    np.testing.assert_allclose(norm, np.linalg.norm(flat), rtol=1e-5)
  # A network of the reader's own, without blocks.
  assert block_norms({'dense': {'kernel': np.ones(3)}}).shape == (0,)


class Layer(NamedTuple):
  kernel: Any
  bias: Any


@flax.struct.dataclass
class Scaled:
  value: Layer
  alpha: Any


class Branches(nnx.Module):
  """Two scalars in one block, one of which has no layer."""

  def __init__(self):
    self.out = Scalar(1.0)
    self.alpha = nnx.Param(jnp.asarray(2.0))


class Scalar(nnx.Module):
  def __init__(self, alpha):
    self.alpha = nnx.Param(jnp.asarray(alpha))
    self.kernel = nnx.Param(jnp.ones((2, 3)))


def test_fields_of_tuples_and_structs_are_leaf_names():
  layer = Layer(kernel=np.ones((2, 3)), bias=np.ones(3))
  tree = {'block1': Scaled(value=layer, alpha=np.float32(0.5))}
  labels = param_labels(tree)
  assert labels['block1'].value == Layer('kernel', 'bias')
  assert labels['block1'].alpha == 'alpha'
  mask = decay_mask(tree)['block1']
  assert (mask.value, mask.alpha) == (Layer(True, False), False)
  assert count_parameters(tree) == {
    'kernel': (1, 6),
    'bias': (1, 3),
    'alpha': (1, 1),
  }
  assert [*alphas(tree).values()] == [0.5]
  with pytest.raises(InputError, match="'a/value' has the unknown leaf name"):
    param_labels({'a': Scaled(value=np.ones(1), alpha=np.ones(()))})


def test_the_state_of_an_nnx_module_has_the_names_of_its_variables():
  state = nnx.state(nnx.Dict(block1=Branches(), block2=Scalar(3.0)))
  labels = param_labels({'all': state})['all']
  assert nnx.to_pure_dict(labels) == {
    'block1': {'alpha': 'alpha', 'out': {'alpha': 'alpha', 'kernel': 'kernel'}},
    'block2': {'alpha': 'alpha', 'kernel': 'kernel'},
  }
  assert count_parameters(state) == {'alpha': (3, 3), 'kernel': (2, 12)}
  found = {name: float(alpha) for name, alpha in alphas(state).items()}
  assert found == {'block1': 2, 'block1/out': 1, 'block2': 3}
  # A variable may hold a tree: its names count, its own does not.
  tree = nnx.State({'layer': nnx.Param(Layer(np.ones((2, 3)), np.ones(3)))})
  assert count_parameters(tree) == {'kernel': (1, 6), 'bias': (1, 3)}


def test_no_scalar_of_a_block_is_lost():
  def block(i):
    out, mlp = {'alpha': np.float32(i)}, {'alpha': np.float32(i + 0.5)}
    return {'attention': {'out': out}, 'mlp1': {'kernel': np.ones(2)}, 'b': mlp}

  def flat(i):
    a, b = block(i)['attention']['out'], block(i)['b']
    return {'out': a, 'mlp2': b}

  deep = {f'block{i}': flat(i) for i in range(1, 12)}
  expected = {}
  for i in range(1, 12):
    expected |= {f'body/block{i}/mlp2': i + 0.5, f'body/block{i}/out': i}
  assert alphas({'body': deep}) == expected
  assert [*alphas({'body': deep})] == [*expected]
  stacked = alphas({'body': stack_blocks(deep)})
  assert {name: float(alpha) for name, alpha in stacked.items()} == expected
  assert [*stacked] == [*expected]
  # Branches that are modules of their own, each with its scalar.
  assert alphas({'block1': block(1)}) == {
    'block1': 1.5,
    'block1/attention': 1,
  }
  # One on the way to another, and alone at the top.
  nested = {'a': {'alpha': np.float32(1), 'b': {'alpha': np.float32(2)}}}
  assert alphas(nested) == {'a': 1, 'a/b': 2}
  assert [*alphas({'alpha': np.float32(1)}).values()] == [1]
  # Modules that are called `blocks` and stack nothing.
  plain = {'blocks': {'my_blocks': {'out': {'alpha': np.float32(1)}}}}
  assert alphas(plain) == {'blocks/my_blocks': 1}
