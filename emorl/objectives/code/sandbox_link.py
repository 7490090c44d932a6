"""Tests and the code they test, in two processes that exchange plain data: no test ever compares an object of the code's own.

The process of the tests forks that of the code. A function, class or object of the code is there a `Handle`: what is done
with it goes as JSON over a pipe, and comes back as exact built-in values (a subclass as its base, a numpy array as lists,
fractions, decimals, dates), or as another handle, which compares with nothing. Arguments that the code changes in place are
changed here too, what it prints is printed here, its exceptions are raised as the built-in ones they derive from, and it may
call functions it was handed. Modules that compare and count (`TRUSTED`) are the tests' own, whatever the code makes of them.

Imported by its path in a sandbox's interpreter; nothing of emorl is.
"""

import ast
import builtins
import collections
import contextlib
import importlib
import io
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

_LARGEST = 64 << 20  # bytes of one message
TRUSTED = {
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "json",
    "math", "numpy", "operator", "random", "re", "statistics", "string", "typing",
}  # fmt: skip
_MUTABLE = (list, dict, set, bytearray, collections.deque)
_ABSENT = object()
_read, _write, _getpid, _exit = (
    os.read,
    os.write,
    os.getpid,
    os._exit,
)  # as they are before the code can put others in their place
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "builtins.int": int.__int__,
    "builtins.float": float.__float__,
    "builtins.str": str.__str__,
}
# What a type's constructor takes: one iterable, or these arguments.
_ITEMS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "builtins.list": list.__iter__,
    "builtins.tuple": tuple.__iter__,
    "builtins.set": set.__iter__,
    "builtins.frozenset": frozenset.__iter__,
    "builtins.dict": lambda value: iter([(key, dict.__getitem__(value, key)) for key in dict.__iter__(value)]),
    "collections.deque": collections.deque.__iter__,
}
_ARGUMENTS: dict[str, Callable[[Any], Sequence[Any]]] = {
    "builtins.bytes": lambda value: (value.decode("latin-1"), "latin-1"),
    "builtins.bytearray": lambda value: (value.decode("latin-1"), "latin-1"),
    "builtins.complex": lambda value: (value.real, value.imag),
    "builtins.range": lambda value: (value.start, value.stop, value.step),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
    "decimal.Decimal": lambda value: (str(value),),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.time": lambda value: (value.hour, value.minute, value.second, value.microsecond, value.tzinfo),
    "datetime.datetime": lambda value: (*value.timetuple()[:6], value.microsecond, value.tzinfo),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
    "datetime.timezone": lambda value: (value.utcoffset(None),),
}


class _Link:
    """One end; either side may ask the other while it is being asked."""

    def __init__(self, source: int, target: int) -> None:
        self.ended = False
        self._source, self._target = source, target
        self._held: list[Any] = []  # what the other side knows by its place
        self._places: dict[int, int] = {}  # id -> place

    def ask(self, function: list[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Has the other side call `function`, which is packed.

        Raises:
            Exception: the built-in one that was raised there.
            EOFError: the other side has ended.
        """
        self._send(["do", function, [self._pack(value) for value in args], self._pack(dict(kwargs))])
        return self._answer(args)

    def _answer(self, args: Sequence[Any] = ()) -> Any:
        """What the other side returns, after all that it asks before."""
        while (message := self._receive())[0] == "do":
            self._send(self._done(*message[1:]))
        kind, value, changed, printed = message
        print(str(printed), end="")
        if kind == "raised":
            raise _exception(*value)
        for place, content in changed:
            _replace(args[place], self._unpack(content))
        return self._unpack(value)

    def _done(self, function: Any, args: list[Any], kwargs: Any) -> list[Any]:
        """Calls; the message with the outcome."""
        printed = io.TextIOWrapper(io.BytesIO(), "utf-8", "replace", write_through=True)
        try:
            values = [self._unpack(value) for value in args]
            with contextlib.redirect_stdout(printed):
                result = self._pack(self._unpack(function)(*values, **self._unpack(kwargs)))
            now = [self._pack(value) if type(value) in _MUTABLE else before for value, before in zip(values, args, strict=True)]
            changed = [(place, after) for place, after in enumerate(now) if after != args[place]]
            return ["done", result, changed, printed.buffer.getvalue().decode()]  # type: ignore[attr-defined]
        except BaseException as error:  # SystemExit is the code's own business too
            said = [value if isinstance(value, str | int) else str(value) for value in error.args]
            return ["raised", [[kind.__name__ for kind in type(error).__mro__], said], [], ""]

    def _pack(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        for base in kind.__mro__:
            name = f"{base.__module__}.{base.__qualname__}"
            if name in _SCALARS:
                return _SCALARS[name](value)
            if name in _ITEMS:
                return [name, [self._pack(item) for item in _ITEMS[name](value)]]
            if name in _ARGUMENTS:
                return [name, [self._pack(item) for item in _ARGUMENTS[name](value)]]
        return self._pack_other(value)

    def _unpack(self, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        name, parts = content
        if name not in _ITEMS and name not in _ARGUMENTS:
            return self._unpack_other(name, parts)
        kind, values = _named(*name.split(".")), [self._unpack(part) for part in parts]
        return kind(values) if name in _ITEMS else kind(*values)

    def _pack_other(self, value: Any) -> Any:
        raise NotImplementedError

    def _unpack_other(self, name: str, parts: Any) -> Any:
        raise NotImplementedError

    def _hold(self, name: str, value: Any) -> list[Any]:
        if id(value) not in self._places:
            self._places[id(value)] = len(self._held)
            self._held.append(value)
        return [name, self._places[id(value)]]

    def _send(self, message: list[Any]) -> None:
        content = json.dumps(message).encode()
        content = memoryview(len(content).to_bytes(8, "big") + content)
        try:
            while content:
                content = content[_write(self._target, content) :]
        except OSError:
            self.ended = True
            raise

    def _receive(self) -> list[Any]:
        return json.loads(self._take(int.from_bytes(self._take(8), "big")))

    def _take(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size <= _LARGEST:
            part = _read(self._source, min(size - len(content), 1 << 20))
            if not part:
                break
            content += part
        if len(content) != size:
            self.ended = True
            raise EOFError("the other side has ended")
        return bytes(content)


def _named(module: str, name: str) -> Any:
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _exception(kinds: list[str], said: list[Any]) -> BaseException:
    """The nearest built-in exception that can be made."""
    for name in kinds:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            with contextlib.suppress(TypeError):  # some take arguments of their own
                return kind(*said)
    return Exception(*said)


def _replace(container: Any, content: Any) -> None:
    """Puts content in place of what a container holds."""
    container.clear()
    (container.update if isinstance(container, dict | set) else container.extend)(content)


class Handle:
    """What the code holds and tests may call, ask for attributes and iterate, but not compare."""

    def __init__(self, link: _Link, place: int) -> None:
        self.__dict__.update(_link=link, _place=place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask(["held", self._place], args, kwargs)

    def _do(self, module: str, function: str, *args: Any) -> Any:
        return self._link.ask(["import", [module, function]], args, {})

    def __getattr__(self, name: str) -> Any:
        return self._do("builtins", "getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("builtins", "setattr", self, name, value)

    def __bool__(self) -> bool:
        return self._do("builtins", "bool", self) is True

    def __len__(self) -> int:
        return self._do("builtins", "len", self)

    def __str__(self) -> str:
        return self._do("builtins", "str", self)

    def __iter__(self) -> Iterator[Any]:
        return self._do("builtins", "iter", self)

    def __next__(self) -> Any:
        return self._do("builtins", "next", self)

    def __instancecheck__(self, instance: Any) -> bool:
        return self._do("builtins", "isinstance", instance, self) is True

    def __getitem__(self, key: Any) -> Any:
        return self._do("operator", "getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("operator", "setitem", self, key, value)

    def _refuse(self, other: Any) -> Any:
        raise TypeError("an object of the code's own compares with nothing")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class Tester(_Link):
    """The tests' end: believes nothing but plain data."""

    def __init__(self, source: int, target: int, names: Set[str], own: Mapping[str, Any]) -> None:
        """Waits until the code has run.

        Args:
            names: all that the tests may have from the code.
            own: what those mean that the code has from trusted modules, and others that are the tests' own.
        """
        super().__init__(source, target)
        self._handles: dict[int, Handle] = {}
        self._used, self._known = names, own.keys() | vars(builtins).keys()
        self._names: dict[str, Any] = {"__name__": "__main__", **own}
        self._fetched = dict(own)
        self._solution = sys.modules["solution"] = self._answer()

    def passes(self, test: Sequence[types.CodeType]) -> bool:
        """Runs a test's statements, one after the other."""
        try:
            for statement in test:
                self._fetch()
                exec(statement, self._names)
        except BaseException:  # SystemExit is a failure too
            return False
        return not self.ended

    def _fetch(self) -> None:
        """The code's names as they are now, but those that tests have bound; a known one that it redefines (`set = …`) only
        where tests use nothing else of it."""
        defined = self._used & set(self.ask(["import", ["builtins", "dir"]], [self._solution], {}))
        for name in defined - self._known or defined:
            if self._names.get(name, _ABSENT) is self._fetched.get(name, _ABSENT):
                self._names[name] = self._fetched[name] = getattr(self._solution, name)

    def _pack_other(self, value: Any) -> Any:
        if type(value) is Handle:
            return ["held", value._place]
        if isinstance(value, Iterator):
            return ["iterator", [self._pack(item) for item in value]]
        if not callable(value):
            raise TypeError(f"{type(value).__name__} cannot be handed to the code")
        home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if home != "solution" and getattr(sys.modules.get(str(home)), name, None) is value:
            return ["import", [home, name]]
        return self._hold("function", value)

    def _unpack_other(self, name: str, parts: Any) -> Any:
        if name == "function":  # of ours, which the code wants called
            return self._held[parts]
        if name != "held":
            raise TypeError("no plain data")
        return self._handles.setdefault(parts, Handle(self, parts))


class Runner(_Link):
    """The code's end: nothing it says is believed."""

    def run(self, source: str) -> None:
        """Runs the code, then whatever is asked of it until the other side ends."""
        solution, pid = types.ModuleType("solution"), _getpid()
        sys.modules["solution"] = sys.modules["__main__"] = solution

        def start() -> types.ModuleType:
            exec(compile(source, "solution.py", "exec"), vars(solution))
            return solution

        message = self._done(self._hold("held", start), [], ["builtins.dict", []])
        while _getpid() == pid:  # not in a copy that the code forked
            self._send(message)
            message = self._done(*self._receive()[1:])

    def _pack_other(self, value: Any) -> Any:
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return self._pack(value.tolist())
        return self._hold("held", value)

    def _unpack_other(self, name: str, parts: Any) -> Any:
        if name == "held":
            return self._held[parts]
        if name == "import":
            return _named(*parts)
        if name == "iterator":
            return iter([self._unpack(part) for part in parts])
        return lambda *args, **kwargs: self.ask([name, parts], args, kwargs)


def trusted_names(source: str, names: Set[str]) -> dict[str, Any]:
    """Those of the names that the code imports from trusted modules, as it imports them first.

    Raises:
        SyntaxError: the code is none.
    """
    trusted: dict[str, Any] = {}
    for node in ast.parse(source).body:
        bound: list[tuple[str, str, str | None]] = []  # name, module, its attribute
        if isinstance(node, ast.Import):
            tops = [(alias.asname, alias.name if alias.asname else alias.name.partition(".")[0]) for alias in node.names]
            bound = [(name or module, module, None) for name, module in tops]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            pairs = [(alias.asname or alias.name, alias.name) for alias in node.names]
            if ("*", "*") in pairs:
                pairs = [(name, name) for name in names]
            bound = [(name, node.module, attribute) for name, attribute in pairs]
        for name, module, attribute in bound:
            if name in names and name not in trusted and module.partition(".")[0] in TRUSTED:
                with contextlib.suppress(ImportError, AttributeError):
                    trusted[name] = _named(module, attribute) if attribute else importlib.import_module(module)
    return trusted


def open_link(source: str) -> tuple[int, int]:
    """Forks the process of the code, which this one can hear and ask by the descriptors returned, and nothing else binds."""
    sys.set_int_max_str_digits(0)
    calls, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        for descriptor in set(range(3, os.sysconf("SC_OPEN_MAX"))) - {calls[0], answers[1]}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        try:
            Runner(calls[0], answers[1]).run(source)
        finally:
            _exit(0)
    os.close(calls[0])
    os.close(answers[1])
    return answers[0], calls[1]
