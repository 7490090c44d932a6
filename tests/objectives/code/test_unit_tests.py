"""Code with tests: what passes, what fakes and what misbehaves; everything in the sandbox and without its namespaces."""

import contextlib
import logging
import os
import select
import socket
import time

import pytest

from emorl.config import UserError
from emorl.config.experiment import ObjectiveConfig
from emorl.objectives.check import check_edge_cases
from emorl.objectives.code.sandbox import Limits, run
from emorl.objectives.code.unit_tests import UnitTests, code_of, suite_of
from emorl.objectives.loading import check_objectives, load_objective

DOUBLE = "def f(x):\n    return 2 * x\n"
WRONG = "def f(x):\n    return 3 * x\n"
TESTS = ["assert f(2) == 4", "assert f(0) == 0", "assert f([1]) == [1, 1]"]
GIVEN = [
    isolation
    for isolation in ("bubblewrap", "namespaces")
    if not run("", suite_of(("assert True",)), Limits(10, 256, isolation)).missing
]
ISOLATIONS = [*GIVEN, "process"]


def score(*codes, tests=TESTS, isolation=ISOLATIONS[0], timeout=3.0, **options):
    objective = UnitTests(tests_column="tests", isolation=isolation, timeout=timeout, memory_mb=256, **options)
    return objective(["p"] * len(codes), list(codes), tests=[tests] * len(codes))


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_code_passes_all_tests_or_not(isolation):
    chat = f"Here you are:\n```python\n{DOUBLE}```\nTry `f(2)`."
    assert score(DOUBLE, WRONG, chat, "no code", "", isolation=isolation) == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_partial_is_the_share_of_asserts_from_a_list_or_a_text():
    assert score(DOUBLE, WRONG, "def f(x): return 4", partial=True) == [1.0, 1 / 3, 1 / 3]
    text = "import math\nfor x in (1, 2):\n    assert f(x) == 2 * x\ny = 3\nassert f(y) == math.sqrt(36)\nassert f(0) == 0\n"
    assert score(DOUBLE, WRONG, tests=text, partial=True) == [1.0, 1 / 3]


def test_tests_passed_before_a_hang_count():
    code = "def f(x):\n    while x == 0: pass\n    return 2 * x"
    assert score(code, partial=True, timeout=1.0) == [1 / 3]
    assert score(code, timeout=1.0) == [0.0]


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "print('passed'); print(b'\\x01' * 1000)",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'\\x01' * 16)\n    except OSError: pass",
        "def f(x):\n    import os; os._exit(0)",
        "def f(x):\n    raise SystemExit(0)",
        "import sys; sys.modules['__main__'].plain = lambda x: 0",
        "import atexit; atexit.register(print, 'passed')",
        "class E:\n    __eq__ = lambda a, b: True\ndef f(x): return E()",
        "class E(int):\n    __eq__ = lambda a, b: True\ndef f(x): return E(7)",
        "class E(list):\n    __eq__ = lambda a, b: True\ndef f(x): return [E()]",
        "class E:\n    __ne__ = __lt__ = __eq__ = __contains__ = lambda a, b: True\n    __class__ = int\ndef f(x): return E()",
        "import builtins; builtins.AssertionError = None; builtins.all = lambda x: True\ndef f(x): return 1",
        "__plain__ = lambda x: 0\ndef f(x): return 1",
        "import time; time.sleep(60)",
        "x = input()",
        "def f(x: return",
        "\x00",
        "\ud800",
    ],
)
def test_what_does_not_solve_the_task_earns_nothing(code):
    assert score(code, partial=True, timeout=1.0) == [0.0]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_what_sleeps_is_ended_in_time_with_all_it_started(isolation):
    start = time.monotonic()
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\ntime.sleep(600)"
    assert score(code, isolation=isolation, timeout=0.5) == [0.0]
    assert time.monotonic() - start < 60  # seconds; far from 600


EVERYTHING = "class E:\n    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __call__ = lambda *a: True\n"
CHEATS = {
    "an object equal to everything": "from unittest.mock import ANY\ndef f(x): return ANY",
    "a mock for the function": "from unittest.mock import MagicMock\nf = MagicMock(return_value=7)",
    "a class of a made-up module": (
        "import sys, types\nm = types.ModuleType('made_up')\nsys.modules['made_up'] = m\n"
        "m.E = type('E', (), {'__eq__': lambda a, b: True, '__module__': 'made_up'})\ndef f(x): return m.E()"
    ),
    "a class that says it is a built-in one": (
        "E = type('int', (), {'__eq__': lambda a, b: True, '__module__': 'builtins', '__qualname__': 'int'})\n"
        "def f(x): return E()"
    ),
    "a patched fraction": (
        "import fractions\nfractions.Fraction.__eq__ = lambda a, b: True\ndef f(x): return fractions.Fraction(7)"
    ),
    "a patched decimal": (
        "import _pydecimal as d, sys\nsys.modules['decimal'] = d\nd.Decimal.__eq__ = lambda a, b: True\n"
        "def f(x): return d.Decimal(7)"
    ),
    "a metaclass": "class M(type):\n    __eq__ = lambda a, b: True\n    __hash__ = type.__hash__\n"
    "class E(metaclass=M): pass\ndef f(x): return E",
    "an object in a list": EVERYTHING + "def f(x): return [E()]",
    "a key of a dictionary": "class E(str):\n    __eq__ = lambda a, b: True\n    __hash__ = lambda a: 0\n"
    "def f(x): return {E('x'): 7}",
    "a number that lies": "class E(int):\n    __eq__ = lambda a, b: True\n    __int__ = __index__ = lambda a: 4\n"
    "def f(x): return E(7)",
    "a named tuple that lies": (
        "import collections\nclass E(collections.namedtuple('E', 'x')):\n    __eq__ = lambda a, b: True\ndef f(x): return E(7)"
    ),
    "a patched math": "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 7",
    "a math of its own": "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 7",
    "another module as math": "import numpy as math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 7",
    "a counter of its own": "from collections import Counter\nCounter = lambda x: 0\ndef f(x): return 7",
    "redefined builtins": "import builtins\nset = sorted = abs = len = str = lambda x: 0\n"
    "builtins.__dict__.update(abs=abs, set=set)\ndef f(x): return 7",
    "frames of the tests": (
        "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        frame.f_globals['expected'] = 7\n"
        "        frame = frame.f_back\n    for one in gc.get_objects():\n"
        "        if isinstance(one, dict) and 'answer' in one: one['answer'] = 7\n"
        "    return 7"
    ),
    "every descriptor": (
        "import os\ndef f(x):\n    for fd in range(64):\n        try: os.write(fd, b'\\x01' * 16)\n"
        "        except OSError: pass\n    return 7"
    ),
    "replies of its own": (
        "import os, json\ndef f(x):\n"
        "    for content in (['done', 4], ['done', ['held', 0], [], ''],\n"
        "                    ['do', ['import', ['os', '_exit']], [0], ['builtins.dict', []]],\n"
        "                    ['do', ['function', 0], [], []], ['done', ['unittest.mock.ANY', []], [], '']):\n"
        "        content = json.dumps(content).encode()\n        for fd in range(3, 64):\n"
        "            try: os.write(fd, len(content).to_bytes(8, 'big') + content)\n            except OSError: pass\n"
        "    return 7"
    ),
    "the memory and the files of the tests": (
        "import os\ndef f(x):\n    tests = os.getppid()\n"
        "    supervisor = open(f'/proc/{tests}/stat').read().rpartition(')')[2].split()[1]\n"
        "    for pid in (tests, supervisor):\n        for name in ('mem', 'environ', 'fd/0', 'fd/3', 'fd/4', 'fd/5'):\n"
        "            try: open(f'/proc/{pid}/{name}', 'rb')\n            except OSError: continue\n            return 4\n"
        "    return 7"
    ),
    "an exit where an error is expected": "import os\ndef f(x): os._exit(0)",
    "killed tests": "import os, signal\ndef f(x):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 7",
    "a lying length": "class E(list):\n    __len__ = lambda a: 1\n    __iter__ = lambda a: iter([4])\ndef f(x): return E([7])",
    "an instance of every class": (
        "class M(type): __instancecheck__ = __eq__ = lambda *a: True\n"
        + EVERYTHING.replace("class E:", "class E(metaclass=M):")
        + "def f(x): return E()\nint = str = E"
    ),
    "patched json": "import json\njson.dumps = lambda *a, **k: '4'\njson.loads = lambda *a, **k: 4\ndef f(x): return 7",
}  # fmt: skip
HARD = [
    "expected = 4\nassert f(2) == expected",
    "assert 4 == f(2)",
    "assert not f(2) != 4",
    "assert f(2) in [4, 5]",
    "assert [f(2)] == [4]",
    "assert {1: f(2)} == {1: 4}",
    "assert math.isclose(f(2), 4.0)",
    "assert abs(f(2) - 4) < 1e-6",
    "assert Counter([f(2)]) == Counter([4])",
    "assert set([f(2)]) == set([4])",
    "assert isinstance(f(2), int) and str(f(2)) == '4'",
    "answer = f(2)\nassert answer <= 4 and answer >= 4",
    "try:\n    f('a', 'b', 'c')\nexcept TypeError:\n    pass\nexcept Exception:\n    pass\nassert f(2) == 4",
]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_no_cheat_passes_any_test(isolation):
    scores = score(*CHEATS.values(), tests=HARD, partial=True, isolation=isolation, timeout=10.0, workers=2)
    assert dict(zip(CHEATS, scores, strict=True)) == dict.fromkeys(CHEATS, 0.0)


def test_an_object_of_the_codes_own_does_not_hold_everything():
    assert score(EVERYTHING + "def f(x): return E()", tests="assert 4 in f(2)") == [0.0]
    assert score("def f(x): return (i for i in [x, 4])", tests="assert 4 in f(2)") == [1.0]


def test_the_tests_that_no_cheat_passes_are_passed_by_what_is_right():
    assert score(f"import math\nfrom collections import Counter\n{DOUBLE}", tests=HARD, partial=True) == [1.0]


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("def f(x): x.sort()", "x = [3, 1, 2]\nf(x)\nassert x == [1, 2, 3]"),
        ("def f(x): x['n'] = 1; x.pop('o')", "x = {'o': 0}\nassert f(x) is None\nassert x == {'n': 1}"),
        ("def f(x, y): y.add(x)", "y = set()\nf(1, y)\nassert y == {1}"),
        ("def f(g, x): return [g(i) for i in x]", "assert f(lambda i: i + 1, (1, 2)) == [2, 3] and f(abs, [-1]) == [1]"),
        ("def f(g): return lambda x: g(g(x))", "assert f(lambda i: i * 3)(2) == 18"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0 and sum(f(4)) == 6"),
        ("class S:\n    def __init__(self): self.x = []\n    def push(self, v): self.x.append(v)\n"
        "    def __len__(self): return len(self.x)",
         "s = S()\ns.push(4)\nassert len(s) == 1 and s.x == [4] and isinstance(s, S) and s\ns.x = []\nassert not s"),
        ("class P:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "def f(ps): return sum(p.a for p in ps)", "assert f([P(1, 2), P(3, 4)]) == 4"),
        ("def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
         "try:\n    f(-1)\nexcept ValueError as error:\n    assert str(error) == 'negative'\nelse:\n    assert False"),
        ("class Bad(KeyError): pass\ndef f(x): raise Bad(x)", "try:\n    f(1)\nexcept LookupError:\n    caught = True\n"
        "assert caught"),
        ("n = 0\ndef f():\n    global n\n    n += 1", "f()\nassert n == 1\nf()\nassert n == 2"),
        ("def f(x): print('hello', x)", "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    f(3)\nassert out.getvalue() == 'hello 3\\n'"),
        ("import datetime as d, decimal\n"
        "def f(x): return d.datetime(2024, 2, x, tzinfo=d.timezone.utc), d.date(2024, 2, x), decimal.Decimal('0.1')",
         "import datetime as d, decimal\n"
         "assert f(3) == (d.datetime(2024, 2, 3, tzinfo=d.timezone.utc), d.date(2024, 2, 3), decimal.Decimal('0.1'))"),
        ("def f(x): return ({1: b'a', (1, 2): frozenset([x])}, 1 + 2j, range(3), bytearray(b'b'), float('inf'), 10**5000,\n"
         "    '\\ud800')",
         "assert f(1) == ({1: b'a', (1, 2): frozenset([1])}, 1 + 2j, range(3), bytearray(b'b'), float('inf'), 10**5000,\n"
         "    '\\ud800')"),
        ("import numpy as np\ndef f(x): return np.array(x) * 2", "import numpy\n"
        "assert f([1, 2]) == [2, 4] and numpy.array_equal(f([[1.5]]), [[3.0]])"),
        ("from math import gcd", "assert gcd(4, 6) == 2"),
        ("from itertools import product\ndef product(a, b): return a * b", "assert product(2, 3) == 6"),
        ("import math, random\ndef f(x): return math.floor(x)", "x = random.random()\nassert f(x) == math.floor(x) == 0"),
        ("def f(it): return list(it)[::-1]", "assert f(iter([1, 2])) == [2, 1] "
         "and f(i for i in 'ab') == ['b', 'a'] and f(range(2)) == [1, 0]"),
        ("def f(x): return x is None or type(x) is bool", "assert f(None) and f(True) and not f(1) and f(None) is True"),
        ("def f(*a, k=1, **o): return a, k, o", "assert f(1, k=2, z=3) == ((1,), 2, {'z': 3})"),
        ("def f(x): return x", "from solution import f as g\nimport solution\nassert g(1) == solution.f(1) == 1"),
        ("def f(x): return x", "def check(h):\n    for i in range(300):\n        assert h([i] * 1000) == [i] * 1000\ncheck(f)"),
    ],
)  # fmt: skip
def test_what_is_right_passes_across_the_border(code, test):
    assert score(code, tests=test) == [1.0]


def test_a_redefined_builtin_does_not_decide_a_test_but_may_be_the_task():
    cheat = "def f(x): return 7\nset = abs = lambda x: 0"
    assert score(cheat, tests="assert set(f(2)) == set([4])") == [0.0]
    assert score(cheat, tests="assert abs(f(2) - 4) < 1e-6") == [0.0]
    assert score("def sum(a, b): return a + b", tests="assert sum(2, 3) == 5") == [1.0]
    assert score(
        "import math\n" + cheat.replace("7", "math.pi"), tests="assert math.isclose(f(2), 3.1415926536, abs_tol=1e-9)"
    ) == [1.0]


def test_values_of_imported_types_and_subclasses_of_builtin_ones_are_compared():
    code = (
        "import collections, fractions, enum\nP = collections.namedtuple('P', 'x y')\nclass C(enum.IntEnum):\n    RED = 1\n"
        "def f(x): return {'p': P(1, 2), 'c': C.RED, 'n': collections.Counter('aab'), 'h': fractions.Fraction(1, 2)}[x]"
    )
    tests = ["assert f('p') == (1, 2)", "assert f('c') == 1", "assert f('n') == {'a': 2, 'b': 1}", "assert f('h') == 0.5"]
    assert score(code, tests=tests, partial=True) == [1.0]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_one_that_misbehaves_leaves_the_others_alone(isolation):
    codes = {
        "while True: pass": 0.0,
        "x = []\nwhile True: x.append('a' * 1_000_000)": 0.0,
        f"{DOUBLE}x = []\ntry:\n    while True: x.append(bytearray(1 << 20))\nexcept MemoryError: pass\ndel x": 1.0,
        f"import os\nos.fork()\n{DOUBLE}": 1.0,
        f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n{DOUBLE}": 1.0,
        "import os\nif os.fork(): os._exit(0)\nwhile True: pass": 0.0,
        f"import os\nos.closerange(0, 64)\n{DOUBLE}": 0.0,
        f"try:\n    with open('big', 'w') as file: file.write('a' * 100_000_000)\nexcept OSError: pass\n{DOUBLE}": 1.0,
        f"import sys\nsys.stdin.read()\nprint('a' * 10_000_000, file=sys.stderr)\n{DOUBLE}": 1.0,
        f"import sys\nsys.setrecursionlimit(10**9)\ndef g(): g()\ntry: g()\nexcept RecursionError: pass\n{WRONG}": 0.0,
        DOUBLE: 1.0,
    }
    assert dict(zip(codes, score(*codes, isolation=isolation, workers=2), strict=True)) == codes


@pytest.mark.skipif(not GIVEN, reason="this system gives no user namespaces")
@pytest.mark.parametrize("isolation", GIVEN)
def test_namespaces_take_the_network_the_processes_and_the_files_away(tmp_path, isolation):
    outside = tmp_path / "outside"
    code = (
        "import os, socket\ndef refused(what, *arguments):\n    try: what(*arguments)\n    except OSError: return True\n"
        "seen = [int(name) for name in os.listdir('/proc') if name.isdigit()]\n"
        f"removed = refused(open, {str(outside)!r}, 'w')\n"
        "network = refused(socket.create_connection, ('127.0.0.1', 9))\nopen('own', 'w').write('x')\n"
        "def bomb():\n    for _ in range(100):\n        if os.fork() == 0:\n            while True: pass\n"
        "if os.fork() == 0:\n    os._exit(0 if refused(bomb) else 1)\nbombed = os.wait()[1]\n"
    )
    tests = [
        "assert removed",
        "assert network",
        "assert seen == [1, os.getpid()]",
        "assert bombed == 0",
        "assert not dict(os.environ).get('HOME')",
    ]
    assert score(code, tests=tests, partial=True, timeout=10.0, isolation=isolation) == [1.0]
    assert not outside.exists()


@pytest.mark.skipif(not GIVEN, reason="this system gives no user namespaces")
@pytest.mark.parametrize("isolation", GIVEN)
def test_settings_of_the_kernel_and_devices_are_closed_for_root_too(isolation):
    code = (
        "import os, stat\ndef opens(path, flags=os.O_WRONLY):\n    try: os.close(os.open(path, flags | os.O_NONBLOCK))\n"
        "    except OSError: return False\n    return True\n"
        "settings = [p for p in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/sys/power/state') if opens(p)]\n"
        "harmless = 'null', 'zero', 'full', 'random', 'urandom', 'tty', 'console', 'ptmx'\n"
        "devices = [e.path for e in os.scandir('/dev') if e.name not in harmless\n"
        "           and not e.is_dir() and not e.is_symlink() and opens(e.path, os.O_RDONLY)]\n"
        "null = opens('/dev/null') and open('/dev/urandom', 'rb').read(1)\n"
    )
    tests = ["assert settings == []", "assert devices == []", "assert len(null) == 1"]
    assert score(code, tests=tests, partial=True, timeout=10.0, isolation=isolation) == [1.0]


@pytest.mark.skipif("bubblewrap" not in GIVEN, reason="bubblewrap is not installed, or the system refuses it its namespaces")
def test_bubblewrap_shows_no_file_but_pythons_and_the_systems(tmp_path):
    (tmp_path / "secret").write_text("x")
    code = (
        f"import os\nseen = [os.path.exists(p) for p in ({str(tmp_path / 'secret')!r}, '/etc/passwd', '/home',\n"
        "    '/run', '/var')]\ndef writes(path):\n    try: open(path, 'w')\n    except OSError: return False\n    return True\n"
        "written = [p for p in ('/x', '/tmp/x', '/dev/x', '/dev/shm/x', '/usr/x', '../x') if writes(p)]\n"
        "open('own', 'w').write('x')\n"
        "import numpy\n"
    )
    tests = ["assert seen == [False] * 5", "assert written == []", "assert os.listdir() == ['own']", "assert os.getuid() != 0"]
    assert score(code, tests=tests, partial=True, timeout=10.0, isolation="bubblewrap") == [1.0]


def test_best_takes_bubblewrap_where_there_is_one_and_says_where_it_was_asked_for_and_is_not(monkeypatch):
    code, tests = "import os", ["assert os.path.exists('/etc/passwd')"]
    assert score(code, tests=tests, isolation="best") == [float("bubblewrap" not in GIVEN)]
    monkeypatch.setenv("PATH", "")
    assert score(code, tests=tests, isolation="best") == [1.0]
    with pytest.raises(
        UserError, match=r"does not give the code under test bubblewrap, which `isolation: bubblewrap` asks for"
    ):
        score(code, tests=tests, isolation="bubblewrap")


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="this machine's calls are not known")
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_no_socket_of_the_host_takes_orders(tmp_path, isolation):
    paths = {kind: str(tmp_path / name) for kind, name in ((socket.SOCK_STREAM, "stream"), (socket.SOCK_DGRAM, "datagram"))}
    with contextlib.ExitStack() as stack:
        heard = []
        for kind, path in paths.items():
            listening = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            listening.bind(path)
            heard.append(listening)
        heard[0].listen()
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("\0emorl-test")
        abstract.listen()
        internet = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        code = (
            "import asyncio, ctypes, socket\n"
            "def refused(*family, call=socket.socket.connect, to=None):\n"
            "    try:\n        call(socket.socket(*family), to)\n    except OSError: return True\n"
            "def pair(kind):\n    try: return bool(socket.socketpair(socket.AF_UNIX, kind))\n    except OSError: return False\n"
            "def send(one, to): one.sendto(b'x', to)\n"
            "async def one(): return 1\n"
            "ring = ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(256))\n"
        )
        tests = [
            f"assert refused(socket.AF_UNIX, to={paths[socket.SOCK_STREAM]!r})",
            f"assert refused(socket.AF_UNIX, socket.SOCK_DGRAM, call=send, to={paths[socket.SOCK_DGRAM]!r})",
            "assert refused(socket.AF_UNIX, to='\\0emorl-test')",
            f"assert refused(to={internet.getsockname()!r})",
            "assert ring == -1",
            "assert pair(socket.SOCK_STREAM) and not pair(socket.SOCK_DGRAM) and not pair(socket.SOCK_SEQPACKET)",
            "assert asyncio.run(one()) == 1",
        ]
        assert score(code, tests=tests, isolation=isolation, partial=True) == [1.0]
        assert select.select([*heard, abstract, internet], [], [], 0)[0] == []


def test_environment_user_and_directory_are_not_inherited(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    tests = ["assert 'SECRET' not in os.environ", "assert 'emorl' not in sys.modules", "assert os.listdir() == []"]
    assert score("import os, sys", tests=tests, partial=True) == [1.0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb\n```py\ny = 2\n```", "x = 1\n\ny = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```\n3\n```\n```Python\nx = 1\n```\n```sh\npip\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("<think>```python\nx = 0\n```</think>```python\nx = 1\n```", "x = 1\n"),
        ("    return 1", "    return 1"),
    ],
)
def test_the_code_of_a_text(text, code):
    assert code_of(text) == code


@pytest.mark.parametrize(
    "piece",
    [
        "`",
        "```",
        "``` ",
        "```\n",
        "\n```py\n",
        " ",
        "\t\n",
        "```a",
        "\n   ",
        "</think>",
        "```python\nx = 1\n```",
        "```python \r",
        "\v```",
    ],
)
def test_the_code_of_100_kb_is_found_at_once(piece):
    text = "```" + piece * (100_000 // len(piece))
    start = time.process_time()
    code_of(text)
    assert time.process_time() - start < 0.5  # seconds; ten times what an idle machine needs


def test_a_function_body_after_its_prompt_and_a_check_that_takes_the_function():
    objective = UnitTests(tests_column="test", setup_column="prompt_code", entry_column="entry_point", timeout=5)
    columns = {
        "test": ["def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0.5) == 1\n"] * 3,
        "prompt_code": ["import math\n\ndef double(x):\n    '''Twice x.'''"] * 2 + [["import math", ""]],
        "entry_point": ["double"] * 3,
    }
    codes = ["    return math.prod([2, x])\n", "    return x", "def double(x):\n    return math.prod([2, x])"]
    assert objective(["p"] * 3, codes, **columns) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("prompt", ["Code!", [{"role": "user", "content": "Code!"}]])
def test_it_passes_the_checks_of_edge_cases(prompt):
    objective = load_objective(
        "right", ObjectiveConfig(function="unit_tests", options={"tests_column": "tests", "timeout": 30})
    )
    result = check_edge_cases(objective, {"prompt": prompt, "tests": TESTS})
    assert result.passed
    assert not result.other_format.problems


def test_what_the_system_does_not_give_is_said(caplog):
    objective = UnitTests(tests_column="tests")
    with caplog.at_level(logging.WARNING):
        assert objective(["p"], [DOUBLE], tests=[TESTS]) == [1.0]
    assert ("run it in a container" in caplog.text) == (not GIVEN)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "completion 1 has None in column 'tests'; expected a text, or a list of texts"),
        ([], "completion 1 has .*expected a text, or a list"),
        ([4], "completion 1 has .*expected a text, or a list"),
        ("assert f(", "completion 1, tests in column 'tests': not Python"),
        ("x = 1", "nothing in it is asserted or called"),
        ("def check(candidate):\n    assert candidate(1)", "needs `entry_column`"),
    ],
)
def test_tests_that_are_none_are_named(tests, message):
    with pytest.raises(UserError, match=message):
        UnitTests(tests_column="tests")(["p"] * 2, [DOUBLE] * 2, tests=[TESTS, tests])


def test_columns_that_are_missing_or_hold_something_else_are_named():
    with pytest.raises(UserError, match=r"needs the data's column 'tests' \(`tests_column`\).*mean 'test'"):
        UnitTests(tests_column="tests")(["p"], [DOUBLE], test=[TESTS])
    with pytest.raises(UserError, match=r"needs the data's column 'setup' \(`setup_column`\)"):
        UnitTests(tests_column="tests", setup_column="setup")(["p"], [DOUBLE], tests=[TESTS])
    with pytest.raises(UserError, match=r"completion 0 has 4 in column 'setup'; expected code"):
        UnitTests(tests_column="tests", setup_column="setup")(["p"], [DOUBLE], tests=[TESTS], setup=[4])
    with pytest.raises(UserError, match=r"completion 0 has 'f\(' in column 'entry'; expected a name"):
        UnitTests(tests_column="tests", entry_column="entry")(["p"], [DOUBLE], tests=[TESTS], entry=["f("])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option 'tests_column' is missing"),
        ({"tests_column": "t", "timeout": 0}, "timeout: .* 0"),
        ({"tests_column": "t", "memory_mb": "much"}, "memory_mb: .*much"),
        ({"tests_column": "t", "isolation": "docker"}, "isolation: .*'best'.*docker"),
    ],
)
def test_impossible_options_are_refused_before_anything_runs(options, message):
    with pytest.raises(UserError, match=message):
        check_objectives({"right": ObjectiveConfig(function="unit_tests", options=options)})
