"""Random pickles over the names that a load of a checkpoint can reach; see fuzz_pickles.py."""

import io
import pickle
import random
import struct
import zipfile

CANARY = 'canary'
OURS = (
    'argparse.Namespace', 'builtins.getattr', 'mmengine.logging.history_buffer.HistoryBuffer', 'numpy.dtype',
    'numpy.ndarray', 'numpy._core.multiarray._reconstruct', 'numpy._core.multiarray.scalar',
    'numpy.core.multiarray._reconstruct', 'numpy.core.multiarray.scalar',
    'beit_plugin.checkpoints.stand_ins.PlainArray', 'beit_plugin.checkpoints.stand_ins.PlainDtype',
    'beit_plugin.checkpoints.stand_ins.PlainHistory', 'beit_plugin.checkpoints.stand_ins.PlainNamespace',
)  # fmt: skip
TORCHS = (
    '_codecs.encode', 'builtins.set', 'builtins.complex', 'collections.Counter', 'collections.OrderedDict',
    'torch.Size', 'torch.device', 'torch.float32', 'torch.int64', 'torch.FloatStorage', 'torch.LongStorage',
    'torch.BoolStorage', 'torch.nn.parameter.Parameter', 'torch._utils._rebuild_tensor',
    'torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_tensor_v3', 'torch._utils._rebuild_parameter',
    'torch._utils._rebuild_parameter_with_state', 'torch._utils._rebuild_device_tensor_from_numpy',
    'torch._tensor._rebuild_from_type_v2',
)  # fmt: skip
# torch allows these by itself; they allocate what the file says, or return memory as it was. Our reader refuses them
ALLOCATING = ('builtins.bytearray', 'torch.Tensor', 'torch.FloatTensor', 'torch.storage.UntypedStorage')
REFUSED = ('posix.system', 'builtins.eval', 'builtins.exec', 'builtins.open', 'torch.load')
WORDS = (
    'O', '|O', 'f8', 'i8', 'u1', 'V64', 'U4', 'M8', '<', '>', '|', 'latin1', 'mean', '__init__', '__class__',
    '__dict__', '__setstate__', 'statistics_methods', '_log_history', '_count_history', 'max_length',
    'register_statistics', 'cpu', 'cuda', 'storage', '0', '1', '_metadata', f'touch {CANARY}',
    f'open("{CANARY}", "w")',
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 8, -1, 255, 256, 4096, 2**31 - 1, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))


class Pickles:
    """Writes random pickles of protocol 2, which both readers know."""

    def __init__(self, seed: int, names: tuple[str, ...]) -> None:
        self.random, self.names, self.memo, self.left = random.Random(seed), names, 0, 60

    def one(self) -> bytes:
        """A whole pickle."""
        return b'\x80\x02' + self.value(0) + b'.'

    def value(self, depth: int) -> bytes:
        self.left -= 1
        leaves = (self.number, self.word, self.atom, self.data)
        nested = (
            self.tuple, self.list, self.dict, self.call, self.call, self.new, self.build, self.build, self.array,
            self.array, self.constructed, self.dtype, self.scalar, self.history, self.method, self.namespace,
            self.tensor, self.tensor,
        )  # fmt: skip
        kinds = leaves if depth > 5 or self.left < 0 else (*leaves, self.name, *nested)
        written = self.random.choice(kinds)(depth + 1)
        if self.random.random() < 0.2:
            written += b'q' + bytes([self.memo % 256])
            self.memo += 1
        if self.memo and self.random.random() < 0.15:
            written = b'h' + bytes([self.random.randrange(min(self.memo, 256))])
        return written

    def maybe(self, usual: bytes, depth: int) -> bytes:
        """What a real file has in this place, or anything."""
        chance = self.random.random()
        return usual if chance < 0.85 else self.number() if chance < 0.92 else self.value(depth)

    def number(self, _: int = 0) -> bytes:
        return integer(self.random.choice(NUMBERS))

    def word(self, _: int) -> bytes:
        return text(self.random.choice(WORDS))

    def atom(self, _: int) -> bytes:
        return self.random.choice([b'N', b'\x88', b'\x89', b')', b']', b'}', b'G' + struct.pack('>d', 0.5)])

    def data(self, _: int) -> bytes:
        size = self.random.choice([0, 1, 2, 8, 16, 24, 64])
        return self.bytes(self.random.choice([bytes(size), b'\xff' * size, self.random.randbytes(size)]))

    def bytes(self, data: bytes) -> bytes:
        return call(name('_codecs.encode'), text(data.decode('latin1')), text('latin1'))

    def name(self, _: int = 0) -> bytes:
        return name(self.random.choice(self.names))

    def items(self, depth: int) -> list[bytes]:
        return [self.value(depth) for _ in range(self.random.randrange(4))]

    def tuple(self, depth: int) -> bytes:
        return b'(' + b''.join(self.items(depth)) + b't'

    def list(self, depth: int) -> bytes:
        return b']' + b''.join(item + b'a' for item in self.items(depth))

    def dict(self, depth: int) -> bytes:
        target = self.random.choice(
            [b'}', b'}', call(name('collections.Counter')), call(name('collections.OrderedDict'))]
        )
        target = self.maybe(target, depth)
        return target + b''.join(self.maybe(self.word(depth), depth) + item + b's' for item in self.items(depth))

    def call(self, depth: int) -> bytes:
        return self.maybe(self.name(depth), depth) + self.maybe(self.tuple(depth), depth) + b'R'

    def new(self, depth: int) -> bytes:
        return self.maybe(self.name(depth), depth) + self.maybe(self.tuple(depth), depth) + b'\x81'

    def build(self, depth: int) -> bytes:
        return self.value(depth) + self.random.choice([self.dict, self.tuple, self.value])(depth) + b'b'

    def dtype(self, depth: int) -> bytes:
        code = text(self.random.choice(['f8', 'i8', 'f4', 'b1', 'O', 'V64', 'U4']))
        made = call(name('numpy.dtype'), self.maybe(code, depth), b'\x89', b'\x88')
        state = [integer(3), text('<'), b'N', b'N', b'N', integer(-1), integer(-1), integer(0)]
        state = [self.maybe(part, depth) for part in state]
        return made + self.maybe(b'(' + b''.join(state) + b't', depth) + b'b'

    def array(self, depth: int) -> bytes:
        of, empty = self.maybe(name('numpy.ndarray'), depth), b'(' + integer(0) + b't'
        core = self.random.choice(['numpy._core', 'numpy.core'])
        made = call(name(f'{core}.multiarray._reconstruct'), of, empty, self.bytes(b'b'))
        count = self.random.choice([0, 1, 2, 3, 2**40])
        shape = self.maybe(b'(' + integer(count) + b't', depth)
        state = [integer(1), shape, self.dtype(depth), b'\x89', self.maybe(self.bytes(bytes(8 * min(count, 3))), depth)]
        return made + self.maybe(b'(' + b''.join(state) + b't', depth) + b'b'

    def constructed(self, depth: int) -> bytes:
        """An array by its constructor: shape, dtype, buffer, offset, strides."""
        shape = b'(' + integer(self.random.choice([1, 1, 2, 2**40])) + b't'
        dtype = text(self.random.choice(['O', 'O', 'f8', 'V64'])) if self.random.random() < 0.7 else self.dtype(depth)
        buffer = self.bytes(self.random.choice([b'A' * 16, bytes(range(64))]))
        args = [*(self.maybe(usual, depth) for usual in (shape, dtype, buffer)), self.number()]
        made = name('numpy.ndarray') + b'(' + b''.join(args[: self.random.randrange(1, 5)]) + b't'
        return made + self.random.choice([b'R', b'\x81'])

    def scalar(self, depth: int) -> bytes:
        return call(name('numpy._core.multiarray.scalar'), self.dtype(depth), self.maybe(self.bytes(bytes(8)), depth))

    def method(self, depth: int) -> bytes:
        owner = self.maybe(name('mmengine.logging.history_buffer.HistoryBuffer'), depth)
        return call(name('builtins.getattr'), owner, self.maybe(text('mean'), depth))

    def history(self, depth: int) -> bytes:
        state = {
            'statistics_methods': self.maybe(b'}' + text('mean') + self.method(depth) + b's', depth),
            '_log_history': self.array(depth),
            '_count_history': self.array(depth),
            'max_length': self.maybe(integer(1000), depth),
        }
        pairs = b''.join(text(key) + value + b's' for key, value in state.items())
        made = self.maybe(name('mmengine.logging.history_buffer.HistoryBuffer'), depth) + b')\x81'
        return made + b'}' + pairs + b'b'

    def namespace(self, depth: int) -> bytes:
        return name('argparse.Namespace') + b')\x81' + self.maybe(self.dict(depth), depth) + b'b'

    def tensor(self, depth: int) -> bytes:
        kind = name(self.random.choice(['torch.FloatStorage', 'torch.LongStorage']))
        numel = self.maybe(integer(self.random.choice([4, 2])), depth)
        storage = b'(' + text('storage') + kind + text(self.random.choice('01')) + text('cpu') + numel + b'tQ'
        side = [self.maybe(integer(2), depth), self.maybe(integer(1), depth)]
        size, stride = (b'(' + b''.join(side[: self.random.randrange(3)]) + b't' for _ in range(2))
        args = [storage, self.maybe(integer(0), depth), size, stride, b'\x89', call(name('collections.OrderedDict'))]
        args = [self.maybe(arg, depth) for arg in args]
        return call(name(self.random.choice([n for n in TORCHS if '_rebuild_tensor' in n])), *args)


def text(word: str) -> bytes:
    encoded = word.encode()
    return b'X' + struct.pack('<I', len(encoded)) + encoded


def integer(number: int) -> bytes:
    if 0 <= number < 256:
        return b'K' + bytes([number])
    encoded = pickle.encode_long(number)
    return b'\x8a' + bytes([len(encoded)]) + encoded


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition('.')
    return b'c' + f'{module}\n{attribute}\n'.encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + b'(' + b''.join(args) + b'tR'


def archive(content: bytes) -> bytes:
    """A file of `torch.save` with this pickle and two storages of 16 bytes."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, 'w') as file:
        for part, data in (('data.pkl', content), ('byteorder', b'little'), ('version', b'3\n')):
            file.writestr(f'x/{part}', data)
        for key in '01':
            file.writestr(f'x/data/{key}', bytes(range(16)))
    return written.getvalue()
