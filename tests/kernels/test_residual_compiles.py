"""The kernels of residual sums and norms compile for Hopper: without spills, and with loads of 16 bytes."""

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
from beit_plugin.kernels import residual as kernels
from beit_plugin.kernels.residual_ops import _tile

tools = sorted(Path(triton.__file__).parent.rglob('cuobjdump'))
tokens = ('x', 'y', 'total', 'normed', 'grad_total', 'grad_normed', 'grad_x', 'grad_y')
types = {**dict.fromkeys(tokens, sys.argv[1]), **dict.fromkeys(('R', 'N', 'programs'), 'i32'), 'eps': 'fp32'}

def compile(kernel, left_out=(), num_warps=4, **constants):
    constants.update(dict.fromkeys(left_out))
    names = kernel.arg_names
    signature = {n: 'constexpr' if n in constants else types.get(n, '*fp32') for n in names}
    aligned = {(i,): [['tt.divisibility', 16]] for i, n in enumerate(names) if signature[n].startswith('*')}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=num_warps))
    stack = wide = ''
    if tools:
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(made.asm['cubin'])
            file.flush()
            usage, code = (
                subprocess.run([tools[0], option, file.name], capture_output=True, text=True).stdout
                for option in ('--dump-resource-usage', '--dump-sass')
            )
        stack, wide = re.search(r'STACK:(\\d+)', usage)[1], code.count('LDG.E.128')
    print(kernel.__name__, stack, wide, flush=True)

for C in (384, 768, 1408, 4096):
    forward, backward = (_tile(kind, C)._asdict() for kind in ('forward', 'backward'))
    compile(kernels.forward_kernel, C=C, **forward)
    compile(kernels.backward_kernel, C=C, AFFINE=True, **backward)
compile(kernels.forward_kernel, ('weight', 'bias', 'normed', 'stats'), C=C, **forward)
compile(kernels.forward_kernel, ('y', 'gamma', 'keep', 'total'), C=C, **forward)
norm = ('grad_normed', 'total', 'stats', 'weight', 'grad_x')
compile(kernels.backward_kernel, norm, C=C, AFFINE=False, **backward)
compile(kernels.backward_kernel, ('y', 'gamma', 'keep', 'grad_y'), C=C, AFFINE=True, **backward)
compile(kernels.sums_kernel, C=C, BLOCK_P=64, BLOCK_C=32)
compile(kernels.sums_kernel, ('grad_weight', 'grad_bias'), C=C, BLOCK_P=64, BLOCK_C=32)
"""


@pytest.mark.parametrize('dtype', ['*bf16', '*fp32'])
def test_for_hopper(dtype, tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, dtype],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path)},
    )
    if 'Cannot find ptxas' in done.stderr:
        pytest.skip('this build of Triton brings no compiler for NVIDIA GPUs')
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(' ') for line in done.stdout.splitlines()]
    assert len(rows) == 14
    for name, stack, wide in rows:
        if stack:
            assert stack == '0', f'{name} spills registers'
            assert int(wide) > 0, f'{name} has narrow loads'
