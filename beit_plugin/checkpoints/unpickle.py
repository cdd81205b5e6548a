"""A pickle machine for data: it imports nothing, calls only what it is given, and keeps to a budget of bytes."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from pickletools import genops
from typing import IO, Any

import numpy as np
from torch import Tensor

__all__ = ['DataUnpickler', 'UnknownName']

_OBJECT = 64  # bytes of a small Python object
_KEY_TYPES = (str, int, bytes, bool, type(None))  # a hash of nested tuples could overflow the stack
_LARGEST_KEY = 1 << 60  # beyond it integers can be chosen that all have one hash
_LARGEST_INTEGER = 256  # bits: products of sizes stay cheap


class UnknownName(UnpicklingError):
    """The file holds an object of a class or function that is in no table; its name is the message."""


class DataUnpickler:
    """One pickle after the other from a stream.

    Args:
        functions: what may be called, by the name in the file. They check their arguments.
        values: what else may be named.
        buildable: classes whose objects take a state.
        persistent: what a persistent id (a storage) stands for.
        budget: bytes that all of it may take.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        values: Mapping[str, Any],
        buildable: tuple[type, ...],
        persistent: Callable[[Any], Any],
        budget: int,
    ) -> None:
        self.functions, self.values, self.buildable = functions, values, buildable
        self.persistent, self.budget = persistent, budget

    def charge(self, nbytes: int) -> None:
        self.budget -= nbytes
        if self.budget < 0:
            raise UnpicklingError('it would become far larger than the file')

    def load(self, stream: IO[bytes]) -> Any:
        """The object of the next pickle in the stream, which is left right behind it."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        for opcode, arg, _ in genops(stream):
            self.charge(_OBJECT + (len(arg) if isinstance(arg, str | bytes) else 0))
            if opcode.name == 'STOP':
                return self.stack.pop()
            if isinstance(arg, int) and arg.bit_length() > _LARGEST_INTEGER:
                raise UnpicklingError('it holds an enormous integer')
            self._run(opcode.name, arg)
        raise UnpicklingError('it has no end')

    def _run(self, name: str, arg: Any) -> None:
        stack, memo = self.stack, self.memo
        match name:
            case 'PROTO' | 'FRAME':
                pass
            case 'MARK':
                self.marks.append(len(stack))
            case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
                stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[name])
            case 'EMPTY_DICT' | 'EMPTY_LIST' | 'EMPTY_TUPLE' | 'EMPTY_SET':
                stack.append({'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple, 'EMPTY_SET': set}[name]())
            case (
                'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'LONG4' | 'BINFLOAT'
                | 'BINUNICODE' | 'SHORT_BINUNICODE' | 'BINUNICODE8' | 'BINBYTES' | 'SHORT_BINBYTES' | 'BINBYTES8'
            ):  # fmt: skip
                stack.append(arg)
            case 'BINSTRING' | 'SHORT_BINSTRING':  # of Python 2; genops reads them as latin1
                stack.append(arg.encode('latin1'))
            case 'BINPUT' | 'LONG_BINPUT':
                memo[arg] = stack[-1]
            case 'MEMOIZE':
                memo[len(memo)] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(memo[arg])
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case 'TUPLE' | 'LIST':
                stack.append((tuple if name == 'TUPLE' else list)(self._since_mark()))
            case 'APPEND' | 'APPENDS' | 'ADDITEMS':
                items = [stack.pop()] if name == 'APPEND' else self._since_mark()
                self._extend(stack[-1], items, list if name != 'ADDITEMS' else set)
            case 'SETITEM' | 'SETITEMS':
                items = [stack.pop() for _ in range(2)][::-1] if name == 'SETITEM' else self._since_mark()
                self._update(stack[-1], items)
            case 'GLOBAL':
                module, attribute = arg.split(' ', 1)
                stack.append(self._named(f'{"builtins" if module == "__builtin__" else module}.{attribute}'))
            case 'STACK_GLOBAL':
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._named(f'{module}.{attribute}'))
            case 'REDUCE' | 'NEWOBJ':
                args, function = stack.pop(), stack.pop()
                stack.append(self._call(function, args))
            case 'BUILD':
                state = stack.pop()
                self._build(stack[-1], state)
            case 'BINPERSID':
                stack.append(self.persistent(stack.pop()))
            case _:
                raise UnpicklingError(f'its pickle has the instruction {name}, which protocols from 2 on do not use')

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _named(self, name: str) -> Any:
        if name in self.functions:
            return self.functions[name]
        if name in self.values:
            return self.values[name]
        raise UnknownName(name)

    def _extend(self, target: Any, items: list[Any], kind: type) -> None:
        if type(target) is not kind or (kind is set and not all(map(_is_key, items))):
            raise UnpicklingError(f'it adds to a {type(target).__name__}')
        target.extend(items) if kind is list else target.update(items)

    def _update(self, target: Any, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if not isinstance(target, dict) or not all(map(_is_key, keys)):
            raise UnpicklingError(f'it sets items of a {type(target).__name__}, or by keys that are not plain')
        for key, value in zip(keys, values, strict=True):  # a Counter's update would count them
            target[key] = value

    def _call(self, function: Any, args: Any) -> Any:
        if type(args) is not tuple or not any(function is known for known in self.functions.values()):
            raise UnpicklingError(f'it calls a {type(function).__name__}')
        if function in (set, Counter, OrderedDict):
            return self._collection(function, *args)
        self.charge(sum(map(_weight, args)))
        result = function(*args)
        if isinstance(result, Tensor):  # several may share a storage
            self.charge(result.numel() * result.element_size())
        return result

    def _collection(self, kind: Any, content: Any = ()) -> Any:
        self.charge(_weight(content))
        pairs = content.items() if type(content) is dict else content
        if type(pairs) not in (tuple, list, type({}.items())):
            raise UnpicklingError(f'it makes a {kind.__name__} of a {type(content).__name__}')
        keys = [pair if kind is set else pair[0] for pair in pairs]
        if not all(map(_is_key, keys)):
            raise UnpicklingError(f'it makes a {kind.__name__} of keys that are not plain')
        return kind(pairs) if kind is not Counter else Counter(dict(pairs))

    def _build(self, target: Any, state: Any) -> None:
        if type(target) is OrderedDict:  # of a state dict: the versions of its modules
            if type(state) is not dict:
                raise UnpicklingError('an OrderedDict with such a state')
            target.__dict__.update({name: value for name, value in state.items() if name == '_metadata'})
        elif type(target) in self.buildable:
            self.charge(_weight(state))
            target.__setstate__(state)
        else:
            raise UnpicklingError(f'it sets the state of a {type(target).__name__}')


def _is_key(value: Any) -> bool:
    return isinstance(value, _KEY_TYPES) and not (isinstance(value, int) and abs(value) > _LARGEST_KEY)


def _weight(value: Any, nested: bool = True) -> int:
    """Bytes of a copy of a value that is not a tensor."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, np.ndarray):
        return value.nbytes
    if nested and isinstance(value, dict | tuple | list | set):
        values = value.values() if isinstance(value, dict) else value
        return sum(_OBJECT + _weight(one, False) for one in values)
    return 0
