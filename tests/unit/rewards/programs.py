# SPDX-License-Identifier: Apache-2.0
"""Programs for the grader: honest ones in the styles of contests, and hostile ones.

Every honest program is right. A hostile one is wrong unless it gets what it is after.
"""

import json

BLOCK = "Here it is.\n\n```python\n{}\n```\n"


def stdin(given: str, wanted: str, **more) -> str:
    return json.dumps({"inputs": [given], "outputs": [wanted], **more})


def call(given: str, wanted: str, name: str = "f", **more) -> str:
    return json.dumps({"inputs": [given], "outputs": [wanted], "fn_name": name, **more})


SUM = stdin("1 2\n", "3\n")
ADD = "a, b = map(int, input().split())\nprint(a + b)"
LINES = stdin("3\n1\n2\n3\n", "6\n")

# response, reference
HONEST = {
    "input": (BLOCK.format(ADD), SUM),
    "sys.stdin.read": (BLOCK.format("import sys\nprint(sum(map(int, sys.stdin.read().split())))"), SUM),
    "sys.stdin.buffer.read": (BLOCK.format("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))"), SUM),
    "stdin.buffer.readline": (
        BLOCK.format("from sys import stdin\nread = stdin.buffer.readline\nprint(sum(map(int, read().split())))"), SUM
    ),
    "input = sys.stdin.readline": (BLOCK.format(f"import sys\ninput = sys.stdin.readline\n{ADD}"), SUM),
    "stdout.write": (
        BLOCK.format("from sys import stdin, stdout\nstdout.write(str(sum(map(int, stdin.readline().split()))))"), SUM
    ),
    "stdout.buffer.write": (
        BLOCK.format("import sys\nx = sum(map(int, input().split()))\nsys.stdout.buffer.write(b'%d\\n' % x)"), SUM
    ),
    "open(0)": (BLOCK.format("print(sum(map(int, open(0).read().split())))"), SUM),
    "open(0, 'rb')": (BLOCK.format("print(sum(map(int, open(0, 'rb').read().split())))"), SUM),
    "os.read": (BLOCK.format("import os\nprint(sum(map(int, os.read(0, os.fstat(0).st_size).split())))"), SUM),
    "/dev/stdin": (BLOCK.format("print(sum(map(int, open('/dev/stdin').read().split())))"), SUM),
    "/dev/fd/0": (BLOCK.format("print(sum(map(int, open('/dev/fd/0').read().split())))"), SUM),
    "/dev/stdout": (BLOCK.format("x = sum(map(int, input().split()))\nprint(x, file=open('/dev/stdout', 'w'))"), SUM),
    "/dev/stderr": (BLOCK.format(f"print(1, file=open('/dev/stderr', 'w'))\n{ADD}"), SUM),
    "os.devnull": (BLOCK.format(f"import os, sys\nsys.stderr = open(os.devnull, 'w')\n{ADD}"), SUM),
    "/dev/urandom": (
        BLOCK.format(f"import random\nrandom.seed(open('/dev/urandom', 'rb').read(8))\n{ADD}"), SUM
    ),
    "a file in /dev/shm": (
        BLOCK.format("open('/dev/shm/x', 'w').write(input())\nprint(sum(map(int, open('/dev/shm/x').read().split())))"),
        SUM,
    ),
    "a file in /tmp": (
        BLOCK.format("import tempfile\nf = tempfile.TemporaryFile('w+')\nf.write(input())\nf.seek(0)\n"
                     "print(sum(map(int, f.read().split())))"), SUM
    ),
    "for line in sys.stdin": (BLOCK.format("import sys\nnext(sys.stdin)\nprint(sum(map(int, sys.stdin)))"), LINES),
    "until EOFError": (
        BLOCK.format("n = 0\ninput()\ntry:\n    while 1:\n        n += int(input())\nexcept EOFError:\n    print(n)"),
        LINES,
    ),
    "fileinput": (BLOCK.format("import fileinput\nx = [int(l) for l in fileinput.input()]\nprint(sum(x[1:]))"), LINES),
    "exit() at the end": (BLOCK.format(f"{ADD}\nexit()"), SUM),
    "quit(0)": (BLOCK.format(f"{ADD}\nquit(0)"), SUM),
    "sys.exit in a function": (BLOCK.format(f"import sys\ndef main():\n    {ADD.replace(chr(10), chr(10) + '    ')}\n"
                                            "    sys.exit(0)\nmain()"), SUM),
    "raise SystemExit": (BLOCK.format(f"{ADD}\nraise SystemExit"), SUM),
    "os._exit after a flush": (BLOCK.format(f"import os, sys\n{ADD}\nsys.stdout.flush()\nos._exit(0)"), SUM),
    "a global counter": (
        BLOCK.format("t = 0\ndef g(x):\n    global t\n    t += x\nfor x in input().split(): g(int(x))\nprint(t)"),
        SUM,
    ),
    "globals()": (BLOCK.format("globals()['k'] = 5\na, b = map(int, input().split())\nprint(a + b + k - 5)"), SUM),
    "the main guard": (
        BLOCK.format("def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()"),
        SUM,
    ),
    "code after the main guard": (
        BLOCK.format("def main():\n    return 1\nif __name__ == '__main__':\n    x = main()\n" + ADD), SUM
    ),
    "from __future__": (BLOCK.format(f"from __future__ import annotations\n{ADD}"), SUM),
    "triple-quoted text": (BLOCK.format(f'"""Reads two\nnumbers."""\ns = """x\n  y"""\nassert s\n{ADD}'), SUM),
    "a docstring with a fence": (BLOCK.format(f'"""Use\n  ```text\n  1 2\n"""\n{ADD}'), SUM),
    "a thread with a large stack": (
        BLOCK.format("import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
                     "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
                     "def main(): print(f(20000) + int(input()))\n"
                     "t = threading.Thread(target=main)\nt.start()\nt.join()"), stdin("2", "20002")
    ),
    "deep recursion": (
        BLOCK.format("def f(n): return n and 1 + f(n - 1)\nprint(f(int(input())))"), stdin("5000", "5000")
    ),
    "dataclasses and heapq": (
        BLOCK.format("from dataclasses import dataclass\nimport heapq\n@dataclass(order=True)\nclass P:\n    v: int\n"
                     "h = [P(int(x)) for x in input().split()]\nheapq.heapify(h)\nprint(heapq.heappop(h).v)"),
        stdin("3 1 2", "1")
    ),
    "numpy": (BLOCK.format("import numpy as np\nprint(np.array(input().split(), dtype=int).sum())"), SUM),
    "a forgotten import": (BLOCK.format("a, b = map(int, input().split())\nprint(gcd(a * 3, b * 3))"), SUM),
    "a BytesIO for output": (
        BLOCK.format("import sys, os, io, atexit\nbuf = io.BytesIO()\nsys.stdout = io.TextIOWrapper(buf, write_through="
                     "True)\natexit.register(lambda: os.write(1, buf.getvalue()))\n" + ADD), SUM
    ),
    "white space": (BLOCK.format("print('  3  ')\nprint()"), SUM),
    "CRLF": ((BLOCK.format(ADD)).replace("\n", "\r\n"), SUM),
    "a blank after the language": (f"```python   \n{ADD}\n```  ", SUM),
    "```Python 3": (f"```Python 3\n{ADD}\n```", SUM),
    "```{.python}": (f"```{{.python .numberLines}}\n{ADD}\n```", SUM),
    "~~~": (f"~~~py\n{ADD}\n~~~", SUM),
    "````": (f"````python\ns = '```'\n{ADD}\n````", SUM),
    "no language, sample output behind": (f"```\n{ADD}\n```\nIt prints\n```\n3\n```", SUM),
    "sample output marked as text behind": (f"```python3\n{ADD}\n```\nOutput:\n```text\nCase: 4 = four\n```", SUM),
    "a draft, thoughts": (f"<think>```py\nprint(0)\n```</think>\n```py\nprint(1)\n```\nNo:\n```py\n{ADD}\n```", SUM),
    "in a list": ("1. So:\n   ```python\n   " + ADD.replace("\n", "\n   ") + "\n   ```\n", SUM),
    "class Solution": (BLOCK.format("class Solution:\n    def f(self, a: List[int], k: int) -> int:\n"
                                    "        return sum(a) * k"), call("[1, 2]\n2", "6")),
    "a bare function": (BLOCK.format("# no class Solution\ndef f(s):\n    return s[::-1]"), call('"a b"', '"b a"')),
    "a usage example behind": (
        "```python\ndef f(x):\n    return x + 1\n```\nFor example:\n```python\nprint(f(1))\n```", call("1", "2")
    ),
    "tuples in a list": (BLOCK.format("def f(n): return [(i, i) for i in range(n)]"), call("2", "[[0, 0], [1, 1]]")),
    "a sum of fractions": (BLOCK.format("def f(a, b): return a + b"), call("0.1\n0.2", "0.3")),
    "a numpy integer": (BLOCK.format("import numpy as np\ndef f(a): return np.sum(a)"), call("[1, 2]", "3")),
    "keys that are numbers": (BLOCK.format("def f(a): return {x: 1 for x in a}"), call("[1, 2]", '{"1": 1, "2": 1}')),
    "prints while it computes": (BLOCK.format("def f(a):\n    print('debug', a)\n    return a"), call("[]", "[]")),
    "a fraction printed otherwise": (BLOCK.format("print(0.1 + 0.2)"), stdin("", "0.3")),
    "a fraction where an integer is": (BLOCK.format("print(10 / 2)"), stdin("", "5")),
}  # fmt: skip

# Right programs' answers beside wrong numbers: response, reference.
WRONG = {
    "-1000001 for -1000000": (BLOCK.format("print(-1000001)"), stdin("", "-1000000\n")),
    "a wrong integer beside -1": (BLOCK.format("print(-1)\nprint(998244353)"), stdin("", "-1\n998244352\n")),
    "3 for [3]": (BLOCK.format("def f(a): return 3"), call("1", "[3]")),
    "[1, 2] for [[1, 2]]": (BLOCK.format("def f(a): return [1, 2]"), call("1", "[[1, 2]]")),
    "5.1 for 5": (BLOCK.format("print(5.1)"), stdin("", "5")),
    "one line for two": (BLOCK.format("print('1 2')"), stdin("", "1\n2")),
    "lines in another order": (BLOCK.format("print('2\\n1')"), stdin("", "1\n2")),
    "a large integer that a float rounds": (BLOCK.format("print(1e18)"), stdin("", "1000000000000000001")),
    "nothing": (BLOCK.format("pass"), SUM),
    "True for a text": (BLOCK.format("def f(a): return True"), call("1", '"True"')),
    "NaN": (BLOCK.format("def f(a): return float('nan')"), call("1", "1.5")),
    "a set": (BLOCK.format("def f(a): return {1}"), call("1", "[1]")),
    "a syntax error": (BLOCK.format("print(3"), SUM),
    "a draft that is right and a last one that is not": (f"```python\n{ADD}\n```\nNo:\n```python\nprint(0)\n```", SUM),
    "only thoughts": (f"<think>```python\n{ADD}\n```</think> I do not know.", SUM),
    "a block that is not closed": (f"```python\n{ADD}\n", SUM),
    "nothing at all": ("", SUM),
}

_FRAMES = """import sys
f = sys._getframe()
while f:
    for scope in (f.f_locals, f.f_globals):
        for value in list(scope.values()):
            if isinstance(value, dict) and "outputs" in value:
                print(value["outputs"][0])
    f = f.f_back
"""
_EQUAL = "class Y({0}):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n" \
         "    __hash__ = {0}.__hash__\ndef f(a): return Y()"  # fmt: skip
_GOT = "\nprint(3 if got else 0)"  # the right answer only if the attack has worked
_CATCH = "got = False\ntry:\n    {}\n    got = True\nexcept BaseException: pass" + _GOT

# program, whether a function is asked for
HOSTILE = {
    "expected output in frames": (_FRAMES, False),
    "expected output in frames, as a function": ("def f(a):\n    " + _FRAMES.replace("\n", "\n    "), True),
    "equal to everything, int": (_EQUAL.format("int"), True),
    "equal to everything, list": (_EQUAL.format("list"), True),
    "equal to everything, str": (_EQUAL.format("str"), True),
    "replaces comparisons": (
        "import sys\nfor name, m in list(sys.modules.items()):\n    for key in list(vars(m)):\n"
        "        if 'compare' in key or 'same' in key: setattr(m, key, lambda *a: True)\nprint('x')", False
    ),
    "the whole memory by gc": (
        "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and ('outputs' in o or 'expected' in o):\n"
        "        print(o)", False
    ),
    "a report that nobody can read": (
        "import os\nfor fd in range(3, 30):\n    try: os.pwrite(fd, b'{\"result\": ' + b'[' * 10**6, 0)\n"
        "    except OSError: pass\ndef f(a): os._exit(0)", True
    ),
    "reports success in every file": ("import os\nfor fd in range(3, 30):\n    try: os.write(fd, b'rrrr')\n"
                                      "    except OSError: pass", False),
    "the grader's files": (
        "import os\nfor root, _, files in os.walk('/'):\n    for f in files:\n"
        "        if f in ('programs.py', 'truth.py', 'slots.py'): print(3)", False
    ),
    "files of the machine": (_CATCH.format("open('/etc/passwd')"), False),
    "files of other processes": (
        "got = False\nimport os\nfor p in os.listdir('/proc'):\n    try: got |= p.isdigit() and "
        "b'pytest' in open(f'/proc/{p}/cmdline', 'rb').read()\n    except OSError: pass" + _GOT, False
    ),
    "secrets of the environment": ("import os\ngot = 'OPD_TEST_SECRET' in os.environ" + _GOT, False),
    "secrets of the parent's environment": (
        _CATCH.format("import os; assert b'SECRET' in open('/proc/%d/environ' % os.getppid(), 'rb').read()"), False
    ),
    "a shell by os": (_CATCH.format("import os; assert os.system('true') == 0"), False),
    "a shell by posix": (_CATCH.format("import posix; assert posix.system('true') == 0"), False),
    "a shell by importlib": (
        _CATCH.format("import os, importlib; assert importlib.reload(os).system('true') == 0"), False
    ),
    "a shell by subprocess": (_CATCH.format("import subprocess; subprocess.check_call(['true'])"), False),
    "a shell by ctypes": (_CATCH.format("import ctypes; assert ctypes.CDLL(None).system(b'true') == 0"), False),
    "another program": (_CATCH.format("import os, sys; os.execv(sys.executable, ['python', '-c', 'print(3)'])"), False),
    "the network": (_CATCH.format("import socket; socket.create_connection(('127.0.0.1', {PORT}), 1)"), False),
    "the network by ctypes": (
        _CATCH.format("import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0"), False
    ),
    "writes beside the grader": (_CATCH.format("open('{MARKER}', 'w').write('x')"), False),
    "writes raw files": (_CATCH.format("import io; io.FileIO('{MARKER}', 'w').write(b'x')"), False),
    "removes files": (_CATCH.format("import posix; posix.unlink('{KEPT}')"), False),
    "three GiB": (_CATCH.format("x = bytearray(3 << 30)"), False),
    "three GiB, little by little": (_CATCH.format("x = [bytearray(1 << 20) for _ in range(3000)]"), False),
    "fills /dev/shm": (
        _CATCH.format("f = open('/dev/shm/x', 'wb'); [f.write(bytes(1 << 20)) for _ in range(200)]"), False
    ),
    "fills /tmp": (
        "got = False\nn = 0\ntry:\n    for n in range(40):\n        open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))\n"
        "except OSError: pass\ngot = n > 30" + _GOT, False
    ),
    "very many files": (
        "n = 0\ntry:\n    for n in range(20000):\n        open(f'/tmp/{n}', 'w').close()\nexcept OSError: pass\n"
        "got = n > 5000" + _GOT, False
    ),
    "very many files in /dev/shm": (
        "n = 0\ntry:\n    for n in range(20000):\n        open(f'/dev/shm/{n}', 'w').close()\nexcept OSError: pass\n"
        "got = n > 5000" + _GOT, False
    ),
    "files in memory": (_CATCH.format("import os; [os.memfd_create('x') for _ in range(9)]"), False),
    "kills its parent": (_CATCH.format("import posix; posix.kill(posix.getppid(), 9)"), False),
    "kills everybody": (_CATCH.format("import os; os.kill(-1, 9)"), False),
    "a fork bomb": ("import os\nwhile True: os.fork()", False),
    "a fork bomb by posix": ("import posix\nwhile True:\n    try: posix.fork()\n    except OSError: pass", False),
    "a bomb of threads": (
        "import threading, time\nn = 0\ntry:\n    for n in range(500):\n"
        "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nexcept BaseException: pass\n"
        "got = n > 100" + _GOT, False
    ),
    "a sleeper that is forked": ("import os, time\nif not os.fork(): time.sleep(1000)\nprint(3)", False),
    "a daemon": (
        "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(1000)\nprint(3)", False
    ),
    "a thread that sleeps": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nprint(3)", False
    ),
    "multiprocessing": ("import multiprocessing as m\nif __name__ == '__main__':\n    m.Process(target=print).start()\n"
                        "    print(3)", False),
    "infinite output": ("while True: print('x' * 1000)", False),
    "infinite errors": ("import sys\nwhile True: sys.stderr.write('x' * 100000)", False),
    "a hole in its output": ("import os\nos.lseek(1, 1 << 40, 0)\nos.write(1, b'3')", False),
    "a busy loop": ("while True: pass", False),
    "a busy loop in C": ("print(sum(iter(int, 1)))", False),
    "deaf to signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass", False
    ),
    "sleeps": ("import time\ntime.sleep(1000)\nprint(3)", False),
    "endless recursion": ("def g(n): return g(n + 1)\ng(0)", False),
    "recursion in C": ("x = []\nfor _ in range(10**6): x = [x]\nprint(repr(x))", False),
    "a crash": ("import ctypes\nctypes.string_at(0)", False),
    "os._exit": ("import os\nos._exit(0)", False),
    "sys.exit": ("import sys\nsys.exit()", False),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", False),
    "BaseException": ("class Odd(BaseException):\n    def __str__(self): raise Odd\nraise Odd", False),
    "a number of many digits": ("def f(a): return 10 ** 5000", True),
    "a very large result": ("def f(a): return 'x' * (100 << 20)", True),
    "a deep result": ("def f(a):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x", True),
    "raises limits": (
        "import resource\ngot = False\nfor kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU):\n"
        "    try:\n        resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)\n        got = True\n"
        "    except (OSError, ValueError): pass" + _GOT, False
    ),
    "a user namespace": (_CATCH.format("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0"), False),
    "a mount": (
        _CATCH.format("import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0"), False
    ),
    "debugs its parent": (_CATCH.format("import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0"), False),
    "devices": (
        _CATCH.format("import os; assert set(os.listdir('/dev')) & {{'mem', 'sda', 'vda', 'nvidia0', 'kvm'}}"), False
    ),
    "packages of the grader": (
        _CATCH.format("import sys; sys.path += [p + '/opd_ext' for p in sys.path]; import verl"), False
    ),
}  # fmt: skip
