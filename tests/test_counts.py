"""Counting traffic, FLOPs and collectives in optimized HLO."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import by_compiler

from skipinit_jax.ahead_of_time.counts import Counts, count, narrow_sums
from skipinit_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
BODY = """
%body (p: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %p = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %x = f32[1024]{0} get-tuple-element(%p), index=1
  %one = s32[]{:S(6)} constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  %y = f32[1024]{0} negate(%x)
  ROOT %t = (s32[], f32[1024]{0}) tuple(%next, %y)
}

%condition (p: (s32[], f32[1024])) -> pred[] {
  %p = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%p), index=0
  %n = s32[]{:S(6)} constant(7)
  ROOT %less = pred[]{:S(6)} compare(%i, %n), direction=LT
}
"""
MAIN = """
ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[1024]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[1024]{0}) while(%t), condition=%condition, body=%bodyNOTE
  ROOT %out = f32[1024]{0} get-tuple-element(%loop), index=1
}
"""


def entry(lines, result='f32[1024]'):
  return f'ENTRY %main () -> {result} {{\n{lines}\n}}\n'


def hbm(lines, computations=''):
  return count(computations + entry(lines)).hbm_bytes


def test_operands_and_outputs_of_an_instruction_are_counted():
  assert (
    hbm("""
  %a = f32[1024]{0} parameter(0)
  %b = bf16[1024]{0:T(1024)(128)(2,1)} parameter(1)
  ROOT %c = f32[1024]{0} add(%a, %b)""")
    == 4096 + 2048 + 4096
  )


def test_buffers_in_another_memory_space_are_left_out():
  assert (
    hbm("""
  %a = f32[1024]{0:T(1024)S(1)} parameter(0)
  %b = f32[1024]{0:T(1024)S(0)} parameter(1)
  ROOT %c = f32[1024]{0:T(1024)S(1)} add(%a, %b)""")
    == 4096
  )


def test_what_only_names_memory_is_free():
  assert not hbm("""
  %a = f32[1024]{0} parameter(0)
  %t = (f32[1024]{0}, f32[1024]{0}) tuple(%a, %a)
  %g = f32[1024]{0} get-tuple-element(%t), index=1
  %c = f32[1024]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %b = f32[32,32]{1,0} bitcast(%g)""")


def test_other_custom_calls_are_counted():
  assert (
    hbm("""
  %a = f32[1024]{0} parameter(0)
  ROOT %c = f32[1024]{0} custom-call(%a), custom_call_target="TopK" """)
    == 8192
  )


def test_asynchronous_copies_count_once_and_where_they_leave_the_chip():
  assert (
    hbm("""
  %a = f32[1024]{0} parameter(0)
  %s = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[1024]{0:S(1)} copy-done(%s)
  %u = ((f32[1024]{0}), f32[256]{0:S(1)}, s32[]{:S(2)}) slice-start(%a)
  %v = f32[256]{0:S(1)} slice-done(%u)
  %w = (f32[1024]{0}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%a)
  ROOT %x = f32[1024]{0} copy-done(%w)""")
    == 4096 + 1024 + 2 * 4096
  )


def test_slices_count_what_they_take():
  assert (
    hbm("""
  %a = f32[8,1024]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  ROOT %d = f32[1,1024]{1,0} dynamic-slice(%a, %i, %i)""")
    == 2 * 4096
  )


def test_an_update_in_place_counts_the_update():
  assert (
    hbm("""
  %a = f32[8,1024]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %u = f32[1,1024]{1,0} parameter(2)
  ROOT %d = f32[8,1024]{1,0} dynamic-update-slice(%a, %u, %i, %i)""")
    == 2 * 4096
  )


INNER = """
%copies (p: f32[8,1024]) -> f32[8,1024] {
  %p = f32[8,1024]{1,0} parameter(0)
  ROOT %c = f32[8,1024]{0,1} copy(%p)
}

%takes (p: f32[8,1024], i: s32[]) -> f32[1024] {
  %p = f32[8,1024]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %d = f32[1,1024]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,1024}
  ROOT %b = f32[1024]{0} bitcast(%d)
}

%fused (into: f32[8,1024], from: f32[8,1024], i: s32[]) -> f32[8,1024] {
  %into = f32[8,1024]{1,0} parameter(0)
  %from = f32[8,1024]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %same = f32[8,1024]{0,1} fusion(%into), kind=kLoop, calls=%copies
  %row = f32[1024]{0} fusion(%from, %i), kind=kLoop, calls=%takes
  %twice = f32[1024]{0} add(%row, %row)
  %update = f32[1,1024]{1,0} bitcast(%twice)
  ROOT %d = f32[8,1024]{1,0} dynamic-update-slice(%same, %update, %i, %i)
}
"""


FUSION = """
  %a = f32[8,1024]{1,0} parameter(0)
  %b = f32[8,1024]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %f = f32[8,1024]{1,0} fusion(%a, %b, %i), kind=kLoop, calls="""


def test_slices_and_updates_count_within_fusions_of_fusions():
  assert hbm(FUSION + '%fused', INNER) == 2 * 4096


OUTER = """
%outer (into: f32[8,1024], from: f32[8,1024], i: s32[]) -> f32[8,1024] {
  %into = f32[8,1024]{1,0} parameter(0)
  %from = f32[8,1024]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %f = f32[8,1024]{1,0} fusion(%into, %from, %i), calls=%fused
}
"""


def test_an_update_by_a_fusion_in_a_fusion_counts_the_update():
  assert hbm(FUSION + '%outer', INNER + OUTER) == 2 * 4096


def test_a_fusion_reads_the_whole_of_what_it_also_uses_whole():
  text = INNER.replace(
    '%update = f32[1,1024]{1,0} bitcast(%twice)',
    '%sum = f32[1,1024]{1,0} reduce(%from, %row), dimensions={0}\n'
    '  %update = f32[1,1024]{1,0} add(%sum, %row)',
  )
  assert hbm(FUSION + '%fused', text) == 9 * 4096


@pytest.mark.parametrize(
  ('note', 'runs'),
  [
    ('', 7),  # From the condition.
    (', backend_config={"known_trip_count":{"n":"5"}}', 5),
  ],
)
def test_a_loop_counts_as_often_as_it_runs(note, runs):
  assert count(BODY + MAIN.replace('NOTE', note)).hbm_bytes == runs * 8192


def test_a_conditional_counts_its_larger_branch_once():
  branches = """
%small (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%large (p: f32[1024]) -> f32[8] {
  %p = f32[1024]{0} parameter(0)
  ROOT %n = f32[8]{0} reduce(%p, %p), dimensions={0}
}
"""
  lines = """
  %c = pred[]{:S(6)} parameter(0)
  %a = f32[8]{0} parameter(1)
  %b = f32[1024]{0} parameter(2)
  ROOT %r = f32[8]{0} conditional(%c, %a, %b), KEYS"""
  for keys in (
    'branch_computations={%small, %large}',
    'true_computation=%small, false_computation=%large',
  ):
    assert hbm(lines.replace('KEYS', keys), branches) == 2 * 4096 + 32
    # A sort in the branch that reads less counts too.
    sorts = branches.replace('negate(%p)', 'sort(%p), to_apply=%less')
    counted = count(sorts + entry(lines.replace('KEYS', keys)))
    assert (counted.sorts, counted.hbm_bytes) == (1, 2 * 4096 + 32)


@pytest.mark.parametrize(
  'op',
  [
    'all-reduce(%a, %b), to_apply=%add',
    'all-reduce-start(%a, %b), to_apply=%add',
  ],
)
def test_collectives_count_what_they_are_given(op):
  kind = '(f32[1024]{0}, bf16[1024]{0})'
  counts = count(
    entry(f"""
  %a = f32[1024]{{0}} parameter(0)
  %b = bf16[1024]{{0}} parameter(1)
  ROOT %r = {kind} {op}""")
  )
  assert counts.collective_bytes == 4096 + 2048
  assert counts.hbm_bytes == 2 * (4096 + 2048)


def test_a_gather_that_is_started_counts_once():
  counts = count(
    entry("""
  %a = f32[1024]{0} parameter(0)
  %s = (f32[1024]{0}, f32[4096]{0}) all-gather-start(%a), dimensions={0}
  ROOT %r = f32[4096]{0} all-gather-done(%s)""")
  )
  assert counts.collective_bytes == 4096
  assert counts.hbm_bytes == 4096 + 4 * 4096


def compiled(f, *args):
  return jax.jit(f).lower(*args).compile().as_text()


@pytest.mark.parametrize(
  ('strides', 'padding', 'lhs', 'rhs', 'groups'),
  [
    ((1, 1), 'SAME', (1, 1), (1, 1), 1),
    ((2, 2), 'SAME', (1, 1), (1, 1), 1),
    ((1, 2), 'VALID', (1, 1), (1, 1), 1),
    ((1, 1), ((2, 1), (0, 3)), (1, 1), (2, 1), 1),
    ((1, 1), ((1, 1), (2, 2)), (2, 2), (1, 1), 1),  # A strided one's gradient.
    ((1, 1), 'SAME', (1, 1), (1, 1), 2),
  ],
)
def test_flops_of_a_convolution_are_its_products(
  strides, padding, lhs, rhs, groups
):
  """A convolution of ones counts the products that no padding takes part in."""

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      strides,
      padding,
      lhs_dilation=lhs,
      rhs_dilation=rhs,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  x, kernel = jnp.ones((2, 9, 8, 6)), jnp.ones((3, 3, 6 // groups, 4))
  products = convolve(x, kernel).sum()
  assert count(compiled(convolve, x, kernel)).flops == 2 * products


def test_flops_of_a_matrix_product_in_nested_scans():
  def f(x, w):
    def outer(x, _):
      return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], None

    return jax.lax.scan(outer, x, None, length=3)[0]

  text = compiled(f, jnp.ones((16, 32)), jnp.ones((5, 32, 32)))
  assert count(text).flops == 3 * 5 * 2 * 16 * 32 * 32


# As XLA writes them for an H100: a convolution of 16 images of 8x8 with 32
# channels, by 64 kernels of 3x3 at a stride of 2, and its two gradients.
IMAGES = 'bf16[16,8,8,32]{3,2,1,0}'
KERNELS = 'bf16[64,3,3,32]{3,2,1,0}'
OUTPUTS = 'bf16[16,4,4,64]{3,2,1,0}'
CUDNN = """
  %a = FIRST parameter(0)
  %b = SECOND parameter(1)
  %c = (RESULT, u8[0]{0}) custom-call(%a, %b), window={size=3x3 pad=0_1x0_1 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$FUNCTION", backend_config={"cudnn_conv_backend_config":{"activation_mode":"kNone"}}
  ROOT %r = RESULT get-tuple-element(%c), index=0"""  # noqa: E501


@pytest.mark.parametrize(
  ('function', 'types'),
  [
    ('convForward', (IMAGES, KERNELS, OUTPUTS)),
    ('convBiasActivationForward', (IMAGES, KERNELS, OUTPUTS)),
    ('convBackwardInput', (OUTPUTS, KERNELS, IMAGES)),
    ('convBackwardFilter', (IMAGES, OUTPUTS, KERNELS)),
  ],
)
def test_calls_of_cudnn_are_convolutions(function, types):
  text = CUDNN.replace('FUNCTION', function)
  for name, kind in zip(('FIRST', 'SECOND', 'RESULT'), types, strict=True):
    text = text.replace(name, kind)
  # By side of 8 there are 4 outputs of 3 taps; the last tap is padding once.
  flops = 2 * 16 * 64 * 32 * (4 * 3 - 1) ** 2
  bytes_ = 2 * (16 * 64 * 32 + 64 * 9 * 32 + 16 * 16 * 64)
  counted = count(entry(text))
  assert counted == Counts(hbm_bytes=bytes_, flops=flops, launches=1)


def test_calls_of_cublas_are_products():
  counted = count(
    entry("""
  %a = f32[128,1000]{1,0} parameter(0)
  %b = f32[128,512]{1,0} parameter(1)
  %c = (f32[1000,512]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %r = f32[1000,512]{1,0} get-tuple-element(%c), index=0""")  # noqa: E501
  )
  assert counted.flops == 2 * 1000 * 512 * 128
  # Its workspace is no traffic that is known.
  assert counted.hbm_bytes == 4 * (128 * 1000 + 128 * 512 + 1000 * 512)


SORTS = """
%sorts (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %s = f32[64]{0} sort(%p), dimensions={0}, to_apply=%less
}
"""


@pytest.mark.parametrize(
  'line',
  [
    'sort(%a), dimensions={0}, to_apply=%less',
    'fusion(%a), kind=kCustom, calls=%sorts',
    'custom-call(%a), custom_call_target="__cub$DeviceRadixSort"',
    'custom-call(%a), custom_call_target="__cub$DeviceRadixSortUnassignedScratch"',  # noqa: E501
  ],
)
def test_sorts_are_counted_however_they_are_called(line):
  lines = f'\n  %a = f32[64]{{0}} parameter(0)\n  ROOT %s = f32[64]{{0}} {line}'
  assert count(SORTS + entry(lines)).sorts == 1


def test_launches_are_what_computes_or_copies():
  counted = count(
    entry("""
  %a = f32[1024]{0} parameter(0)
  %z = f32[] constant(0)
  %b = f32[32,32]{1,0} bitcast(%a)
  %n = f32[32,32]{1,0} negate(%b)
  %s = (f32[1024]{0}, f32[1024]{0}, u32[]) copy-start(%a)
  %d = f32[1024]{0} copy-done(%s)
  %t = (f32[1024]{0}, f32[32,32]{1,0}) tuple(%d, %n)
  ROOT %g = f32[32,32]{1,0} get-tuple-element(%t), index=1""")
  )
  assert counted.launches == 2


def test_launches_of_a_loop_are_those_of_its_steps():
  # Of body and condition: an addition, a negation, a comparison.
  assert count(BODY + MAIN.replace('NOTE', '')).launches == 7 * 3


def test_collectives_are_numbered():
  lines = """
  %a = f32[1024]{0} parameter(0)
  %b = f32[1024]{0} all-reduce(%a), to_apply=%add
  %c = f32[1024]{0} all-reduce-start(%b), to_apply=%add
  ROOT %d = f32[1024]{0} all-reduce-done(%c)"""
  assert count(entry(lines)).collectives == 2


TPU = """
import dataclasses, functools, json, sys
import jax, jax.numpy as jnp
from jax import lax
jax.config.update('jax_platforms', 'cpu')
from skipinit_jax.ahead_of_time import chips
from skipinit_jax.ahead_of_time.counts import count

def scan(body, k):
  return lambda x: lax.scan(lambda c, _: (body(c), None), x, None, length=k)[0]

def step(x):
  return jnp.sin(x) * 1.5

f32, bf16 = jnp.float32, jnp.bfloat16
big = ((64, 1024, 1024), f32)  # Too large for the chip itself.
stack = ((32, 1024, 1024), f32)
convolve = functools.partial(
  lax.conv_general_dilated, window_strides=(1, 1), padding='SAME',
  dimension_numbers=('HWNC', 'HWIO', 'HWNC'))  # The layout that it wants.
programs = {
  'copy': (jnp.copy, [big]),
  'elementwise': (step, [big]),
  'product': (jnp.matmul, [((4096, 8192), bf16), ((8192, 2048), bf16)]),
  'convolution': (
    convolve, [((64, 64, 128, 128), bf16), ((3, 3, 128, 128), bf16)]),
  'scan3': (scan(step, 3), [big]),
  'scan7': (scan(step, 7), [big]),
  'nested': (scan(scan(step, 5), 7), [big]),
  'slices': (
    lambda x: lax.scan(lambda c, x: (c, step(x)), 0, x)[1], [stack]),
  'all_reduce': (lambda x: lax.psum(x, 'i'), [big]),
}
where = chips.topology('v5e:2x2')
out = {}
for name, (f, shapes) in programs.items():
  mapped = jax.pmap(f, axis_name='i', devices=list(where.devices))
  args = [jax.ShapeDtypeStruct((4, *s), d) for s, d in shapes]
  counts = count(mapped.lower(*args).compile().as_text())
  out[name] = dataclasses.asdict(counts)
json.dump(out, sys.stdout)
"""


@pytest.fixture(scope='module')
def tpu():
  """Counts of small programs by the TPU compiler, in a process of its own."""
  return {
    name: Counts(**counts)
    for name, counts in by_compiler('v5e:2x2', TPU).items()
  }


BIG = 64 * 2**20 * 4


@pytest.mark.parametrize('name', ['copy', 'elementwise'])
def test_tpu_reads_and_writes_an_array_once(tpu, name):
  assert tpu[name] == Counts(hbm_bytes=2 * BIG, launches=1)


def test_tpu_product(tpu):
  bytes_ = 2 * (4096 * 8192 + 8192 * 2048 + 4096 * 2048)
  assert tpu['product'].hbm_bytes == bytes_
  assert tpu['product'].flops == 2 * 4096 * 8192 * 2048


def test_tpu_convolution(tpu):
  bytes_ = 2 * (2 * 128 * 64 * 64 * 128 + 9 * 128 * 128)
  assert tpu['convolution'].hbm_bytes == bytes_
  taps = (3 * 64 - 2) ** 2
  assert tpu['convolution'].flops == 2 * 128 * taps * 128 * 128


def test_tpu_scan_counts_its_body_k_times(tpu):
  longer = tpu['scan7'].hbm_bytes - tpu['scan3'].hbm_bytes
  np.testing.assert_allclose(longer, 4 * 2 * BIG, rtol=1e-6)
  # At most one copy of the carry besides.
  np.testing.assert_allclose(
    tpu['scan7'].hbm_bytes, 7 * 2 * BIG, atol=2 * BIG + 1000
  )


def test_tpu_nested_scans_multiply(tpu):
  np.testing.assert_allclose(
    tpu['nested'].hbm_bytes, 35 * 2 * BIG, atol=2 * BIG + 1000
  )


def test_tpu_scan_over_slices_touches_each_once(tpu):
  np.testing.assert_allclose(tpu['slices'].hbm_bytes, BIG, rtol=1e-3)


def test_tpu_all_reduce_over_four_devices(tpu):
  assert tpu['all_reduce'].collective_bytes == BIG
  assert tpu['all_reduce'].hbm_bytes == 2 * BIG


@pytest.mark.parametrize(
  ('start', 'step', 'direction', 'runs'),
  [(0, 1, 'LT', 7), (3, 2, 'LT', 2), (3, 2, 'LE', 3), (1, 1, 'LT', 6)],
)
def test_a_loop_counts_from_where_it_starts(start, step, direction, runs):
  text = (BODY + MAIN).replace('NOTE', '')
  text = text.replace('constant(1)', f'constant({step})')
  text = text.replace('constant(0)', f'constant({start})')
  text = text.replace('direction=LT', f'direction={direction}')
  assert count(text).hbm_bytes == runs * 8192


def test_a_collective_in_an_asynchronous_operation_counts():
  wrapped = """
%wrapped (p: f32[1024]) -> f32[256] {
  %p = f32[1024]{0} parameter(0)
  ROOT %r = f32[256]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}
"""
  counts = count(
    wrapped
    + entry("""
  %a = f32[1024]{0} parameter(0)
  %s = ((f32[1024]{0}), f32[256]{0}) async-start(%a), calls=%wrapped
  ROOT %d = f32[256]{0} async-done(%s), calls=%wrapped""")
  )
  assert counts.collective_bytes == 4096
  assert counts.hbm_bytes == 4096 + 1024


def test_an_unknown_dtype_is_an_error_and_a_token_is_nothing():
  line = '\n  %a = (KIND[8], token[]) custom-call()'
  for kind, bytes_ in (('f8e4m3', 8), ('f4e2m1fn', 4), ('u2', 2)):
    assert hbm(line.replace('KIND', kind)) == bytes_
  with pytest.raises(InputError, match="'f16x'; did you mean 'f16'"):
    hbm(line.replace('KIND', 'f16x'))


ADDER = """
%adder (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %s = bf16[] add(%x, %y)
}
"""


def reduction(dtype, sides, dimensions, result):
  attributes = f'dimensions={{{dimensions}}}, to_apply=%adder'
  return f"""
%fused (p: {dtype}[{sides}]) -> {dtype}[{result}] {{
  %p = {dtype}[{sides}] parameter(0)
  %z = {dtype}[] constant(0)
  ROOT %sum = {dtype}[{result}] reduce(%p, %z), {attributes}
}}
"""


@pytest.mark.parametrize(
  ('computation', 'narrow'),
  [
    (reduction('bf16', '8,32,32,16', '0,1,2', '16'), ['sum']),
    (reduction('f32', '8,32,32,16', '0,1,2', '16'), []),
    (reduction('bf16', '8,8,8,16', '0,1,2', '16'), []),  # 512 elements.
    (reduction('bf16', '513,16', '0', '16'), ['sum']),
    (reduction('bf16', '8192', '0', ''), ['sum']),
  ],
)
def test_sums_of_many_elements_in_bfloat16_are_found(computation, narrow):
  assert narrow_sums(ADDER + computation + entry('')) == narrow
  maximum = ADDER.replace(' add(', ' maximum(')
  assert not narrow_sums(maximum + computation + entry(''))


def test_a_window_counts_its_elements():
  window = '%a, %z), window={size=SIDExSIDE stride=SIDExSIDE}, to_apply=%adder'
  lines = f"""
  %a = bf16[64,64]{{1,0}} parameter(0)
  %z = bf16[] constant(0)
  %w = bf16[2,2]{{1,0}} reduce-window({window.replace('SIDE', '32')}
  ROOT %v = bf16[4,4]{{1,0}} reduce-window({window.replace('SIDE', '16')}"""
  assert narrow_sums(ADDER + entry(lines, 'bf16[4,4]')) == ['w']


def test_a_reduction_of_two_arrays_is_found_by_its_narrow_one():
  lines = """
  %a = f32[1024]{0} parameter(0)
  %b = bf16[1024]{0} parameter(1)
  %z = f32[] constant(0)
  ROOT %r = (f32[], bf16[]) reduce(%a, %b, %z, %z), to_apply=%adder"""
  assert narrow_sums(ADDER + entry(lines)) == ['r']
