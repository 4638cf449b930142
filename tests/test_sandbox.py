# ruff: noqa: E501  (programs are one line each)
"""Hostile programs against the sandbox, all at once; what they leave behind."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from albor import sandbox
from albor.room import below, libc
from albor.sandbox import SandboxError, layers, obstacle, run, run_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
FREE = {"allow_unisolated": bool(obstacle())}
ISOLATED = pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "isolated")
WRONG = "def f(x): return x\n"
RIGHT = "def f(x): return x + 1\n"
TEST = "assert f(1) == 2"
CHECK = "def check(g): assert g(1) == 2\ncheck(f)"
WRITES = """
import os
for fd in range(1024):
    for word in (b"passed", b"ok", b"0", b"True", b"go", b"\\0passed\\x000\\0"):
        try: os.write(fd, word)
        except OSError: pass
"""
FAKE = "import os\nfor fd in range(3, 1024):\n    try: os.write(fd, b'ok')\n    except OSError: pass\n"
HUNT = """
import sys, gc, threading, time
def hunt():
    frame, seen = sys._getframe(), []
    while frame:
        seen += list(frame.f_locals.values()) + list(frame.f_globals.values())
        try: seen += gc.get_referents(frame)
        except RuntimeError: pass
        frame = frame.f_back
    for one in list(sys._current_frames().values()):
        while one:
            seen += list(one.f_locals.values())
            one = one.f_back
    try: seen += gc.get_objects()
    except RuntimeError: pass
    return [x for x in seen if type(x).__name__ == "mmap"]
def tell(found):
    import os
    for page in found:
        for fd in range(3, 1024):
            try: os.write(fd, page[:32])
            except OSError: pass
"""
REWRITE = """
frame = sys._getframe()
while frame:
    if guard := frame.f_locals.get("guard"): guard.__code__ = (lambda *a: None).__code__
    frame = frame.f_back
"""
SWAP = """
import os, socket
mine, theirs = socket.socketpair()
theirs.send(b"go")
for fd in range(3, mine.fileno()):
    try: os.write(fd, b"ok")
    except OSError: continue
    os.dup2(mine.fileno(), fd)
"""
# (name, program, the right status)
HOSTILE: list[tuple[str, str, str]] = [
    ("loop", "while True: pass", "timed out"),
    ("sleep", "import time; time.sleep(99)", "timed out"),
    ("exit", WRONG + "import os; os._exit(0)", "failed"),
    ("sys exit", WRONG + "import sys; sys.exit(0)", "failed"),
    ("exit in f", "def f(x):\n raise SystemExit", "failed"),
    ("exit in f 2", "import os\ndef f(x): os._exit(0)", "failed"),
    ("interrupt", "raise KeyboardInterrupt", "failed"),
    ("base", "class E(BaseException): pass\nraise E('x')", "failed"),
    ("bad str", "class E(Exception):\n def __str__(s): 1/0\nraise E", "failed"),
    ("syntax", "def f(:", "failed"),
    ("nul", "x = '\0'", "failed"),
    ("surrogate", "x = '\udc80'", "failed"),
    ("null", "import ctypes; ctypes.string_at(0)", "crashed"),
    ("abort", "import os; os.abort()", "crashed"),
    ("suicide", "import os; os.kill(os.getpid(), 9)", "crashed"),
    ("stop", "import os; os.kill(os.getpid(), 19)", "timed out"),
    ("memory", "x = 'a' * 10**10", "out of memory"),
    ("memory 2", "x = []\nwhile True: x.append(bytearray(1 << 20))", "out of memory"),
    ("memory 3", "raise MemoryError", "out of memory"),
    ("memory of many", "import os, time\nfor _ in range(9):\n if os.fork() == 0:\n"
     "  x = bytearray(b'1') * (30 << 20); time.sleep(9)\ntime.sleep(9)", "out of memory"),
    ("memory without a name", "import os, time\nfor _ in range(9):\n"
     " os.write(os.memfd_create('x'), bytes(30 << 20))\ntime.sleep(9)", "out of memory"),
    ("shared maps", "import mmap\nm = []\nwhile True: m.append(mmap.mmap(-1, 1 << 24))", "out of memory"),
    ("inodes", "i = 0\nwhile True: open(str(i), 'w').close(); i += 1",
     "timed out" if obstacle() else "failed"),
    ("sparse", "open('s', 'w').truncate(1 << 40)", "failed"),
    ("output", "while True: print('x' * 1000)", "output limit"),
    ("one line", "import os\nwhile True: os.write(1, b'x' * 9999)", "output limit"),
    ("stderr", "import os\nwhile True: os.write(2, b'\\xff\\0' * 999)", "output limit"),
    ("bomb", "import os\nwhile True:\n try: os.fork()\n except OSError: pass", "timed out"),
    ("threads", "import threading, time\nfor _ in range(999):\n"
     " threading.Thread(target=time.sleep, args=(99,)).start()", "failed"),
    ("recursion", "def g(): g()\ng()", "failed"),
    ("deep", "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n"
     " def __repr__(s): return repr(s)\nrepr(A())",
     "failed" if sys.version_info >= (3, 12) else "crashed"),
    ("regex", "import re; re.match('(a+)+$', 'a' * 40 + 'b')", "timed out"),
    ("ignores", "import signal\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n"
     " except (OSError, ValueError): pass\nwhile True: pass", "timed out"),
    ("shell", "import os; os.execv('/bin/sh', ['sh', '-c', 'exit 0'])", "failed"),
    ("no fds", WRONG + "import os; os.closerange(0, 9999)", "failed"),
    ("no fds, right", RIGHT + "import os; os.closerange(0, 9999)", "failed"),
    ("raise limits", "import resource as r\n"
     "r.setrlimit(r.RLIMIT_NOFILE, (9999, 9999))", "failed"),
    ("writes", WRONG + WRITES, "failed"),
    ("fake ask", FAKE + WRONG, "failed"),
    ("prints", WRONG + "print('passed'); print('ok')", "failed"),
    ("patched", WRONG + "import builtins\nbuiltins.exec = builtins.compile = print\n"
     "builtins.AssertionError = KeyError\nbuiltins.exit = print", "failed"),
    ("lying builtins", WRONG + "__builtins__ = {}", "failed"),
    ("patched os", WRONG + "import os\nos.write = os.read = lambda *a: b''\n"
     "os._exit = lambda c: None", "failed"),
    ("trace", WRONG + "import sys\ndef t(f, e, a):\n f.f_lineno = 9\n return t\n"
     "try: sys.settrace(t)\nexcept RuntimeError: pass", "failed"),
    ("audit", WRONG + "import sys\nsys.addaudithook(lambda *a: print(a))", "failed"),
    ("hunt", WRONG + HUNT + FAKE + "time.sleep(.3); tell(hunt())", "failed"),
    ("hunting thread", WRONG + HUNT + FAKE
     + "threading.Thread(target=lambda: [tell(hunt()) or time.sleep(.01)"
     " for _ in range(50)]).start()", "failed"),
    ("hunting at gc", WRONG + HUNT + "gc.set_threshold(1)\n"
     "gc.callbacks.append(lambda *a: tell(hunt()))", "failed"),
    ("thief", WRONG + FAKE.replace("b'ok')", "b'ok'); os.read(fd, 2)"), "timed out"),
    ("guard rewritten", WRONG + HUNT + REWRITE + FAKE + "time.sleep(.3); tell(hunt())", "failed"),
    ("sockets swapped", WRONG + SWAP, "failed"),
    ("guesses in forks", "import os\ndef f(x):\n for guess in range(9):\n  pid = os.fork()\n"
     "  if pid == 0: return guess\n  os.waitpid(pid, 0)", "failed"),
    ("key that lies", WRONG + "class Key:\n asked = 0\n def __hash__(s): return hash('check')\n"
     " def __eq__(s, x):\n  Key.asked += 1\n  return Key.asked > 1\n"
     "globals()[Key()] = lambda x: None", "failed"),
    ("exits in str", "import os\nclass E(BaseException):\n def __str__(s): os._exit(0)\n"
     "def f(x): raise E", "failed"),
    ("exits in thread", "import os, threading, time\ndef f(x):\n"
     " threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)", "failed"),
    ("exits by alarm", "import os, signal, time\nsignal.signal(14, lambda *a: os._exit(0))\n"
     "signal.setitimer(0, .01)\ntime.sleep(9)", "failed"),
    ("exits by faulthandler", WRONG + "import faulthandler, time\n"
     "faulthandler.dump_traceback_later(.01, exit=True)\ntime.sleep(9)", "failed"),
    ("another image", WRONG + "import glob, os\nfor x in glob.glob('/lib*/ld-*') + ['/bin/true']:\n"
     " try: os.execv(x, [x, '--help'])\n except OSError: pass", "failed"),
    ("stops its group", "import os\nfor _ in range(3): os.fork()\nos.killpg(0, 19)", "timed out"),
    ("blocks signals", "import signal, time\nsignal.pthread_sigmask(0, range(1, 65)); time.sleep(9)", "timed out"),
    ("waits for itself", "import os\nos.mkfifo('x'); open('x')", "timed out"),
    ("forked", WRONG + "import os; os.fork()", "failed"),
    ("child lives", WRONG + "import os, sys\nif os.fork(): os._exit(0)", "failed"),
    ("daemon", WRONG + "import os, time\nif os.fork() == 0:\n os.setsid()\n"
     " if os.fork() == 0: time.sleep(99)\n os._exit(0)", "failed"),
    ("kills parents", WRONG + "import os\nfor s in (2, 15, 9, 19):\n"
     " try: os.kill(os.getppid(), s)\n except OSError: pass", "crashed" if obstacle() else "failed"),
    ("gone folder", WRONG + "import os\nos.rmdir(os.getcwd())", "failed"),
    ("fill", "i = 0\nwhile True:\n open(str(i), 'wb').write(b'x' * 2**24); i += 1", "failed"),
]  # fmt: skip
# These do the same and are right besides: they pass.
HARMLESS = [
    ("right", RIGHT),
    ("writes, right", RIGHT + WRITES.replace('b"go", ', "")),
    ("thread stays", RIGHT + "import threading, time\n"
     "threading.Thread(target=time.sleep, args=(99,)).start()"),
    ("daemon, right", RIGHT + "import os, time\nif os.fork() == 0:\n time.sleep(99)"),
    ("signals, right", RIGHT + "import signal\nsignal.signal(15, signal.SIG_IGN)"),
    ("junk", RIGHT + "import os; os.write(1, b'\\xff\\xfe\\0' * 99)"),
    ("open files, right", "a = [open(str(i), 'w') for i in range(9)]\n"
     "def f(x):\n for one in a: one.write('x'); one.flush()\n return x + 1"),
    ("fork, right", RIGHT.replace("return", "return os.waitpid(os.fork() or os._exit(0), 0) and")
     + "import os"),
    ("imports", RIGHT + "import ssl, sqlite3, decimal, typing, asyncio, hashlib"),
    ("input", RIGHT + "import sys; assert sys.stdin.read() == ''"),
    ("hash", RIGHT + "import os; assert set(os.environ) <= {'PATH', 'HOME', 'TMPDIR',"
     "'LANG', 'PYTHONHASHSEED', 'MALLOC_ARENA_MAX', 'LC_CTYPE'}"),
]  # fmt: skip
WALLED = [
    ("socket", "import socket; socket.create_connection(('127.0.0.1', 22), 1)"),
    ("proc", "open('/proc/self/mem')"),
    ("home", f"import os; h = {str(Path.home())!r}\n"
     "assert [x for x in os.listdir(h) if not os.__file__.startswith(f'{h}/{x}/')]"),
    ("temporary", "import os\n"
     "assert [x for x in os.listdir('/tmp') if not os.__file__.startswith(f'/tmp/{x}/')]"),
    ("folder", f"import os; os.listdir({str(Path(__file__).parent)!r})"),
    ("outside", "open('/x', 'w')"),
    ("library", "import os; open(os.__file__, 'a')"),
    ("shm", "open('/dev/shm/x', 'w')"),
    ("project", f"open({__file__!r})"),
    ("link", f"import os; os.symlink({__file__!r}, 'a'); open('a')"),
    ("mount", "import ctypes; assert not ctypes.CDLL(None)"
     ".mount(b'n', b'/lib', b'tmpfs', 0, None)"),
    ("root", "import os; os.setuid(0)"),
    ("another user namespace", "import ctypes; assert not ctypes.CDLL(None).unshare(0x10000000)"),
    ("raw packets", "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    ("device", "import os; os.mknod('sda', 0o60666, os.makedev(8, 0))"),
    ("change root", "import os; os.chroot('/tmp')"),
    ("trace", "import ctypes; assert not ctypes.CDLL(None).ptrace(16, 1, 0, 0)"),
    ("init", "import os; os.stat('/proc/1')"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def heir() -> Iterator[None]:
    """Orphans come to this process (a subreaper), where `traces` sees them."""
    libc("prctl", 36, 1, 0, 0, 0)
    yield
    libc("prctl", 36, 0, 0, 0, 0)


def traces() -> tuple[set[int], set[str]]:
    """Processes below this one, and our folders in the temporary one."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    return set(below(os.getpid())), {
        str(path) for path in folder.glob("albor-sandbox-*")
    }


def test_hostile_programs_get_the_right_word_and_leave_nothing() -> None:
    before, descriptors = traces(), len(os.listdir("/proc/self/fd"))
    jobs = [(program, CHECK) for _, program, _ in HOSTILE]
    jobs += [(program, CHECK) for _, program in HARMLESS]
    results = run_all(jobs, workers=16, timeout=3.0, memory_mb=128, **FREE)
    wrong = [
        (name, result)
        for (name, _, right), result in zip(HOSTILE, results, strict=False)
        if result.status != right
    ]
    rest = results[len(HOSTILE) :]
    wrong += [
        (name, result)
        for (name, _), result in zip(HARMLESS, rest, strict=True)
        if not result.passed
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert traces() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


@ISOLATED
def test_the_walls_stand() -> None:
    results = run_all([(program, "") for _, program in WALLED])
    through = [n for (n, _), r in zip(WALLED, results, strict=True) if r.passed]
    assert not through


def test_an_object_that_lies_passes_and_the_docstring_says_so() -> None:
    lie = (
        "class Liar:\n    def __eq__(self, x): return True\ndef f(x): return Liar()"
    )
    assert run(lie, TEST, **FREE).passed
    assert "__eq__" in str(sandbox.__doc__)


def test_the_detail_names_error_and_line() -> None:
    result = run(WRONG, "x = 1\n" + TEST, **FREE)
    assert result.detail == f"AssertionError (test, line 2: {TEST})"
    assert run("1 / 0", **FREE).detail == "ZeroDivisionError: division by zero"
    assert "code 7" in run("import os; os._exit(7)", **FREE).detail
    assert run("while 1: pass", timeout=0.2, **FREE).detail == "after 0.2 s"


@ISOLATED
def test_bare_runs_are_refused_but_can_be_had() -> None:
    for off in ("mount", "network"):
        with pytest.raises(SandboxError, match="allow_unisolated"):
            run(RIGHT, TEST, without=[off])
    everything = {"mount", "network", "processes", "ipc"}
    daemon = (
        RIGHT + "import os, time\nif os.fork() == 0:\n os.setsid(); time.sleep(99)"
    )
    locked = RIGHT + "import os, typing\nos.makedirs('a/b'); os.chmod('a', 0)"
    before = traces()
    for program in (daemon, locked):
        result = run(program, TEST, without=everything, allow_unisolated=True)
        assert result.passed, result
        assert not any("namespace" in layer for layer in result.layers)
    assert traces() == before


def test_a_killed_parent_leaves_nothing() -> None:
    script = f"""
    from albor.sandbox import run
    print(flush=True)
    run("import os\\nfor _ in range(3): os.fork()\\nwhile True: pass", timeout=60, **{FREE})
    """
    code = textwrap.dedent(script)
    subreaper = "import ctypes; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"
    watcher = f"""
import os, signal, subprocess, sys, time
from albor.room import below
parent = subprocess.Popen([sys.executable, "-c", {code!r}])
while len(below(parent.pid)) < 10: time.sleep(0.05)
parent.kill(); parent.wait()
for _ in range(200):
    time.sleep(0.05)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError: break
print(len(below(os.getpid())))
"""
    found = subprocess.check_output([sys.executable, "-c", subreaper + watcher])
    assert found.split()[-1] == b"0"


@pytest.mark.slow
def test_two_hundred_at_once_leave_nothing() -> None:
    before = traces()
    programs = [program for name, program, _ in HOSTILE if "many" not in name]
    jobs = [(programs[i % len(programs)], TEST) for i in range(200)]
    results = run_all(jobs, workers=40, timeout=2.0, memory_mb=128, **FREE)
    assert len(results) == 200 and not any(result.passed for result in results)
    assert traces() == before


def test_bad_arguments_and_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="timeout is 0"):
        run(RIGHT, TEST, timeout=0)
    with pytest.raises(ValueError, match="roof"):
        run(RIGHT, TEST, without=["roof"])
    with pytest.raises(ValueError, match="workers is -1"):
        run_all([], workers=-1)
    monkeypatch.setattr(sandbox, "obstacle", lambda: "unshare: not permitted")
    with pytest.raises(SandboxError, match="not permitted"):
        run(RIGHT, TEST)
    assert not any("namespace" in layer for layer in layers())
    monkeypatch.setattr("albor.room.stranger", lambda: 0)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    with pytest.raises(SandboxError, match="fork bomb"):
        run(RIGHT, TEST, allow_unisolated=True)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SandboxError, match="WSL"):
        run(RIGHT, TEST)


HEIR = """
from albor.sandbox import *
from albor.room import below, libc
libc("prctl", 36, 1, 0, 0, 0)
"""


def unprivileged(script: str) -> list[str]:
    """The lines that a script prints, run by a user who is not root."""
    python = getattr(sys, "_base_executable", sys.executable)
    for file in (Path(python).resolve(), Path(os.__file__), Path(sandbox.__file__)):
        closed = [x for x in file.parents if not x.stat().st_mode & 1]
        if closed and os.getuid() == 0:
            pytest.skip(f"another user may not enter {closed[-1]}")
    folder = str(Path(sandbox.__file__).parents[1])
    command = [
        python,
        "-c",
        HEIR + textwrap.dedent(script),
    ]
    someone: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
    return subprocess.check_output(
        command, cwd="/", text=True, env={"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        | {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"},
        **(someone if os.getuid() == 0 else {}),
    ).splitlines()  # fmt: skip


def test_unprivileged_users_are_isolated_too() -> None:
    names = [
        "memory of many",
        "guard rewritten",
        "guesses in forks",
        "kills parents",
    ]
    names += ["memory without a name", "stops its group"]
    hostile = [one for one in HOSTILE if one[0] in names]
    jobs = [(program, TEST) for _, program, _ in hostile]
    jobs += [(RIGHT, TEST), *((program, "") for _, program in WALLED)]
    script = f"""
    import json, os
    print(obstacle())
    if not obstacle():
        print(json.dumps(layers()))
        results = run_all({jobs!r}, timeout=3, memory_mb=128)
        print(json.dumps([result.status for result in results]))
        print(below(os.getpid()))
    """
    why, *found = unprivileged(script)
    if why:
        pytest.skip(f"an unprivileged user has no namespaces here: {why}")
    assert {"mount namespace", "network namespace", "user namespace"} <= set(
        json.loads(found[0])
    )
    statuses = json.loads(found[1])
    assert statuses[: len(names)] == [right for _, _, right in hostile]
    assert statuses[len(names)] == "passed"
    through = zip(WALLED, statuses[len(names) + 1 :], strict=True)
    assert not [name for (name, _), status in through if status == "passed"]
    assert found[2] == "[]"


def test_where_namespaces_are_forbidden_programs_are_refused_or_swept() -> None:
    script = f"""
    import os, tempfile
    from pathlib import Path
    user, group = os.getuid(), os.getgid()
    try:
        libc("unshare", 0x10000000)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{{user}} {{user}} 1")
        Path("/proc/self/gid_map").write_text(f"{{group}} {{group}} 1")
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    except OSError:
        pass  # they are forbidden already
    try:
        run({RIGHT!r}, {TEST!r})
    except SandboxError as error:
        print(error)
    bare = dict(timeout=3, allow_unisolated=True)
    print(*run({RIGHT!r}, {TEST!r}, **bare).layers)
    daemon = "import os, time\\nfor _ in range(2):\\n if os.fork() == 0:\\n  os.setsid(); time.sleep(99)\\n"
    many = "a = [open('/dev/null') for _ in range(99)]"
    for program in (daemon + {RIGHT!r}, daemon + {WRONG!r}, many, "while True: pass"):
        print(run(program, {TEST!r}, **bare).status)
    print(below(os.getpid()), len(list(Path(tempfile.gettempdir()).glob("albor-sandbox-*"))))
    """
    before = len(traces()[1])
    refused, active, *statuses, left = unprivileged(script)
    assert "would not be isolated" in refused and "allow_unisolated" in refused
    assert "namespace" not in active and "limits" in active
    assert statuses == ["passed", "failed", "failed", "timed out"]
    assert left == f"[] {before}"
