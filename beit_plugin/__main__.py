"""`python -m beit_plugin SCRIPT ARGS…`: run an unmodified third-party script with the plugin in place."""

import os
import sys

from ._script import run

USAGE = """\
usage: python -m beit_plugin SCRIPT [ARGS...]

Runs a Python script as `python SCRIPT ARGS...` would, with the plugin in place before its first line:
the BEiT models are registered in timm and, if OpenMMLab is installed, in its registries; `mmcv-lite` serves
the compiled ops of mmcv, and `torch.load` reads mmengine's checkpoints. Processes that the script spawns get the same.

examples:
  python -m beit_plugin train.py --model beit_plugin_base_patch16_224 --data-dir DIR   (timm)
  python -m beit_plugin tools/test.py CONFIG CHECKPOINT                                (mmseg, mmdet)
  torchrun --nproc_per_node 2 -m beit_plugin tools/train.py CONFIG --launcher pytorch
"""


def main(argv: list[str]) -> int:
    """Run ``argv[0]`` with the arguments that follow it.

    Returns:
        Exit status: 0, or 2 when no script is given or it cannot be read. The script's own exit passes through.
    """
    if not argv:
        print(USAGE, end='', file=sys.stderr)
        return 2
    if argv[0] in ('-h', '--help'):
        print(USAGE, end='')
        return 0
    path = os.path.join(os.getcwd(), argv[0])
    try:
        with open(path, 'rb') as file:
            source = file.read()
    except OSError as error:
        print(f'beit_plugin: cannot open the script {argv[0]!r}: {error.strerror}', file=sys.stderr)
        return 2
    sys.argv[:] = argv
    run(path, source)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
