"""The kernels compile for a GPU that this machine need not have: for Hopper, to its matrix units, without spills."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from beit_plugin.kernels import rel_pos_attention as kernels
from beit_plugin.kernels.ops import _blocks

head_dim, capability, memory, dtype = int(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
tools = sorted(Path(triton.__file__).parent.rglob('cuobjdump'))
half = dict.fromkeys(('qkv', 'out', 'grad', 'grad_qkv'), f'*{dtype}')
single = dict.fromkeys(('lse', 'delta', 'table', 'places', 'stats', 'folded', 'cls', 'grad_table'), '*fp32')
types = {**half, **single, 'scale': 'fp32', 'offsets': '*i32'}
aligned = ('stride_b', 'stride_n', 'stride_head', 'columns', 'period')

# layouts in which two elements that follow each other in a thread are neighbours in a row
NEIGHBOURS = (
    r'nvidia_mma|linear<.register = \\[\\[0, 1\\]|blocked<.sizePerThread = \\[\\d+, (2|4|8)\\],.*order = \\[1, 0\\]'
)

def compile(kernel, num_warps=4, num_stages=2, maxnreg=None, **constants):
    names = kernel.arg_names
    signature = {n: 'constexpr' if n in constants else types.get(n, 'i32') for n in names}
    attributes = {
        (i,): [['tt.divisibility', 16]] for i, n in enumerate(names) if signature[n].startswith('*') or n in aligned
    }
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
    made = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    stack = matrix = ''
    if tools:
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(made.asm['cubin'])
            file.flush()
            usage, code = (
                subprocess.run([tools[0], option, file.name], capture_output=True, text=True).stdout
                for option in ('--dump-resource-usage', '--dump-sass')
            )
        stack = re.search(r'STACK:(\\d+)', usage)[1]
        matrix = code.count({90: 'HGMMA', 100: 'UTCHMMA'}.get(capability, 'HMMA'))
    lines = made.asm['ttgir'].splitlines()
    layouts = dict(line.split(' = ', 1) for line in lines if line.startswith('#'))
    assembly = [line.rpartition('->')[2] for line in lines if 'elementwise_inline_asm' in line]
    apart = sum(not re.search(NEIGHBOURS, layouts[re.findall(r'#(?!ttg)\\w+', line)[0]]) for line in assembly)
    print(kernel.__name__, made.metadata.shared, stack, matrix, len(assembly), apart, flush=True)

dims = dict(P=1, PAIR=int(sys.argv[2]), D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), DIRECT=True)
for kind in ('forward', 'grad_kv', 'grad_q', 'grad_bias'):
    compile(getattr(kernels, f'{kind}_kernel'), **dims, **_blocks(kind, head_dim, memory)._asdict())
compile(kernels.table_kernel, P=1, BLOCK=512)
compile(kernels.table_sums_kernel, P=1, BLOCK_R=32, BLOCK_O=128, BLOCK=256)
compile(kernels.table_sums_kernel, P=1, BLOCK_R=256, BLOCK_O=16, BLOCK=256)
"""
MATRIX_KERNELS = ('forward_kernel', 'grad_kv_kernel', 'grad_q_kernel', 'grad_bias_kernel')


@pytest.mark.parametrize(
    ('head_dim', 'pairs', 'capability', 'memory', 'dtype'),
    [
        *((d, p, 90, 227, 'bf16') for d, p in ((32, 1), (64, 1), (64, 0), (80, 1), (128, 1))),
        *((d, 1, 80, 99, 'bf16') for d in (64, 128)),  # the smallest memory of those GPUs: GeForce of capability 8.6
        (64, 1, 80, 99, 'fp32'),
        (128, 1, 80, 163, 'fp32'),
        (64, 1, 100, 227, 'bf16'),
        (64, 1, 120, 99, 'fp16'),
    ],
)
def test_compiles(head_dim, pairs, capability, memory, dtype, tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, *map(str, (head_dim, pairs, capability, memory * 1024, dtype))],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path)},
    )
    if 'Cannot find ptxas' in done.stderr:
        pytest.skip('this build of Triton brings no compiler for NVIDIA GPUs')
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(' ') for line in done.stdout.splitlines()]
    assert len(rows) == 7
    for name, shared, stack, matrix, assembly, apart in rows:
        assert int(shared) <= memory * 1024, name
        assert apart == '0' and (int(assembly) > 0) == (name in MATRIX_KERNELS), name
        if stack:
            assert int(stack) <= 16 or capability != 90, f'{name} spills registers'
            assert dtype == 'fp32' or (int(matrix) > 0) == (name in MATRIX_KERNELS), name
