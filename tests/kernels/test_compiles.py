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

head_dim = int(sys.argv[1])
tools = sorted(Path(triton.__file__).parent.rglob('cuobjdump'))
half = dict.fromkeys(('qkv', 'out', 'grad', 'grad_qkv', 'grad_bias'), '*bf16')
single = dict.fromkeys(('lse', 'delta', 'table', 'places', 'sums', 'grad_table'), '*fp32')
types = {**half, **single, 'scale': 'fp32'}
aligned = ('stride_b', 'stride_n', 'stride_head', 'stride_row', 'stride_split')

def compile(kernel, num_warps=4, num_stages=2, **constants):
    names = kernel.arg_names
    signature = {n: 'constexpr' if n in constants else types.get(n, 'i32') for n in names}
    attributes = {
        (i,): [['tt.divisibility', 16]] for i, n in enumerate(names) if signature[n].startswith('*') or n in aligned
    }
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = dict(num_warps=num_warps, num_stages=num_stages)
    made = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options)
    stack = matrix = ''
    if tools:
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(made.asm['cubin'])
            file.flush()
            usage, code = (
                subprocess.run([tools[0], option, file.name], capture_output=True, text=True).stdout
                for option in ('--dump-resource-usage', '--dump-sass')
            )
        stack, matrix = re.search(r'STACK:(\\d+)', usage)[1], code.count('HGMMA')
    print(kernel.__name__, made.metadata.shared, stack, matrix, flush=True)

dims = dict(P=1, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), DIRECT=True)
for kind in ('forward', 'grad_kv', 'grad_q', 'grad_bias'):
    compile(getattr(kernels, f'{kind}_kernel'), **dims, **_blocks(kind, head_dim).options)
compile(kernels.table_kernel, BLOCK=1024)
compile(kernels.row_sums_kernel, P=1, BLOCK_X=16, BLOCK_O=128)
compile(kernels.table_sums_kernel, P=1, BLOCK_Y=32, BLOCK_O=128, BLOCK_N=256)
"""
SHARED_MEMORY = 227 * 1024  # of a block on Hopper


@pytest.mark.parametrize('head_dim', [64, 80, 128])
def test_for_hopper(head_dim, tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, str(head_dim)],
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
    for name, shared, stack, matrix in rows:
        assert int(shared) <= SHARED_MEMORY, name
        if stack:
            assert stack == '0', f'{name} spills registers'
            in_matrix_units = name in ('forward_kernel', 'grad_kv_kernel', 'grad_q_kernel', 'grad_bias_kernel')
            assert (int(matrix) > 0) == in_matrix_units, name
