# Generated from book/sandbox.md: edit the chapter, not this file.
"""Run a program that nobody has read, and say whether it passed its test.

    run("def f(x): return x + 1", "assert f(1) == 2").status == "passed"

Covered: endless loops, fork and memory bombs, floods of output, early exits,
signals, daemons, threads, writes and reads outside, verdicts of its own on any
descriptor, forks that guess, patched builtins, tracing, profiling, audit hooks, gc
and frames, and a parent that is killed.

Not covered: what happens while the test runs, in the program's own names. An object
can lie in `__eq__`, a function can read the test in its caller's frame, a module
that the test imports can be patched; a thread, a signal or a name such as `abs` can
change what the test means. Native code (`ctypes`) can read the whole process, nonce
included, and its SysV memory is not counted for unprivileged callers. The kernel is
trusted: there is no system call filter. Without namespaces (`allow_unisolated`) a
program reads what its user may read, reaches the network, and can kill what its
user may kill. Windows is refused; of macOS only limits and process groups are used
(never run there).
"""

import contextlib
import functools
import inspect
import marshal
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor import room
from albor.verdict import Conversation, judge, killed_for_memory

__all__ = [
    "NAMESPACES",
    "START",
    "TRAVELLERS",
    "Result",
    "SandboxError",
    "anonymous_file",
    "child_code",
    "held",
    "layers",
    "obstacle",
    "run",
    "run_all",
]


class SandboxError(RuntimeError):
    """The system cannot run a program safely, or could not start one."""


@dataclass(frozen=True)
class Result:
    """How one program ended."""

    status: str
    """passed, failed, timed out, out of memory, crashed, or output limit."""
    detail: str
    """The first useful line, "" if it passed. The program may have written it."""
    seconds: float
    """From the start of the program's body; starting Python does not count."""
    layers: tuple[str, ...]
    """The protections that were active."""

    @property
    def passed(self) -> bool:
        """Whether the nonce came back."""
        return self.status == "passed"


NAMESPACES = {  # flags of unshare(2); the mount namespace is entered by init
    "mount": 0,
    "network": 0x40000000,
    "processes": 0x20000000,
    "ipc": 0x08000000 | 0x04000000,
}
START = "import marshal\njob = open(0, 'rb', closefd=False)\n"
START += "exec(marshal.load(job))"
TRAVELLERS = (
    room.libc, judge, room.furnish, room.confine,
    room.init, room.below, room.sweep, room.supervise,
)  # fmt: skip


@functools.cache
def child_code() -> bytes:
    """The room's functions, compiled: what the child runs."""
    source = "from __future__ import annotations\n"
    source += "\n".join(inspect.getsource(one) for one in TRAVELLERS)
    source += "\nsupervise(marshal.load(job))\n"
    return marshal.dumps(compile(source, "<sandbox>", "exec"))


def held(pid: int) -> int:
    """Bytes of memory that the processes below one hold. Linux; elsewhere 0."""
    total, files = 0, {}
    for one in room.below(pid):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) * 1024
            for file in os.scandir(f"/proc/{one}/fd"):
                if os.readlink(file.path).startswith("/memfd:"):
                    files[file.stat().st_ino] = file.stat().st_blocks * 512
    return total + sum(files.values())


@functools.cache
def obstacle() -> str:
    """Why programs cannot be isolated here; "" if they can."""
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces"
    try:
        _run("", "", 20.0)
    except SandboxError as error:
        return str(error)
    return ""


def layers(without: Iterable[str] = ()) -> tuple[str, ...]:
    """The protections that a run would have on this system, strongest first."""
    off = set(without) | (set(NAMESPACES) if obstacle() else set())
    names = [f"{name} namespace" for name in NAMESPACES if name not in off]
    if room.stranger():
        names.append("another user")
    elif names:
        names.append("user namespace")
    if sys.platform == "linux":
        names += ["no new privileges", "memory of the tree"]
    names += [] if "limits" in off else ["limits"]
    return (*names, "process group", "deadline", "output limit")


def anonymous_file(content: bytes = b"") -> int:
    """A descriptor of a file without a name, at its start."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("albor")
    else:
        with tempfile.TemporaryFile() as file:
            number = os.dup(file.fileno())
    left = memoryview(content)
    while left:
        left = left[os.write(number, left) :]
    os.lseek(number, 0, os.SEEK_SET)
    return number


def run(
    program: str,
    test: str = "",
    timeout: float = 5.0,
    *,
    memory_mb: int = 512,
    disk_mb: int = 64,
    processes: int = 32,
    output_kb: int = 1024,
    allow_unisolated: bool = False,
    without: Iterable[str] = (),
) -> Result:
    """Run a program, then its test in the program's namespace.

    `timeout` is in seconds. `without` switches layers off, to show what they do:
    mount, network, processes, ipc or limits. Raises SandboxError where a mount and
    a network namespace cannot be had, unless `allow_unisolated`.
    """
    if sys.platform == "win32":
        raise SandboxError("Windows cannot isolate a program: run this under WSL")
    if os.getuid() == 0 and not room.stranger():
        raise SandboxError(
            "root cannot become another user here, and limits on processes do not "
            "bind root, so a fork bomb would take the machine: run as another user"
        )
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}: give seconds above 0")
    off = frozenset(without)
    if unknown := off - {*NAMESPACES, "limits"}:
        raise ValueError(f"no layer {sorted(unknown)}: {[*NAMESPACES, 'limits']}")
    why = obstacle() or ", ".join(sorted(off & {"mount", "network"}))
    if why and not allow_unisolated:
        raise SandboxError(
            f"programs would not be isolated here ({why}): run as root or where "
            "user namespaces are allowed, or accept by allow_unisolated=True that "
            "they can read your files and reach the network"
        )
    if obstacle():
        off |= set(NAMESPACES)
    sizes = memory_mb, disk_mb, processes, output_kb
    return _run(program, test, timeout, off, layers(off), *sizes)


def _run(
    program: str,
    test: str,
    timeout: float,
    without: frozenset[str] = frozenset(),
    active: tuple[str, ...] = (),
    memory_mb: int = 512,
    disk_mb: int = 64,
    processes: int = 32,
    output_kb: int = 1024,
) -> Result:
    """`run` with its arguments checked: start the child, talk to it, bury it."""
    text = test.encode() + b"\n"
    uid, on_linux = os.getuid(), sys.platform == "linux"
    spaces = [name for name in NAMESPACES if name not in without]
    flags = sum(NAMESPACES[name] for name in spaces)
    folder = "" if "mount" in spaces else tempfile.mkdtemp(prefix="albor-sandbox-")
    stranger = room.stranger()
    if folder and stranger:
        os.chmod(folder, 0o777)
    tasks = processes + (0 if stranger or spaces else room.own_tasks())
    limits = {
        "AS": memory_mb << 20, "CPU": int(timeout) + 3, "NPROC": tasks,
        "NOFILE": 64, "FSIZE": disk_mb << 20, "CORE": 0,
    }  # fmt: skip
    library = Path(os.__file__).parent
    private = any(not path.stat().st_mode & 1 for path in library.parents)
    secret = anonymous_file()
    os.ftruncate(secret, 4096 + len(text))
    mine, verdict = socket.socketpair()
    lifeline, theirs = socket.socketpair()
    output, writer = os.pipe()
    job = {
        "program": program, "verdict": verdict.fileno(), "secret": secret,
        "lifeline": theirs.fileno(), "uid": stranger, "folder": folder,
        "linux": on_linux, "mount": "mount" in spaces,
        "unshare": flags | (0x10000000 if uid and spaces else 0),
        "disk_mb": disk_mb,
        "read_private": bool(folder and stranger and private) and on_linux,
        "limits": {} if "limits" in without else limits,
    }  # fmt: skip
    home = folder or "/tmp"
    environment = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home}
    environment |= {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    environment |= {"MALLOC_ARENA_MAX": "1"}
    if where := os.environ.get("LD_LIBRARY_PATH"):  # Python itself may need it
        environment["LD_LIBRARY_PATH"] = where
    stdin = anonymous_file(child_code() + marshal.dumps(job))
    python = getattr(sys, "_base_executable", sys.executable)
    kills = killed_for_memory()
    try:
        process = subprocess.Popen(
            [python, "-sSPB", "-c", START],
            stdin=stdin, stdout=writer, stderr=writer, cwd="/", env=environment,
            pass_fds=(verdict.fileno(), secret, theirs.fileno()),
            start_new_session=True,
        )  # fmt: skip
        for end in (verdict, theirs):
            end.close()
        for number in (writer, stdin):
            os.close(number)
        nonce = secrets.token_hex(16).encode()
        used = functools.partial(held, process.pid)
        talk = Conversation(mine, lifeline, output, secret, text, nonce, used)
        try:
            talk.hold(timeout, output_kb << 10, memory_mb << 20)
        finally:
            lifeline.close()  # whatever happened, this ends them all
            process.wait()
        talk.drain(output_kb << 10)
    finally:
        mine.close()
        os.close(output)
        os.close(secret)
    if talk.told.startswith("!"):
        raise SandboxError(talk.told[1:])
    if not talk.heard:
        raise SandboxError(f"the child did not start: {talk.last_line()}")
    killed = killed_for_memory() > kills
    status, detail = talk.outcome(timeout, test, killed, output_kb)
    clean = "".join(c if c.isprintable() else "?" for c in detail)[:300]
    return Result(status, clean, talk.seconds, active)


def run_all(
    jobs: Iterable[tuple[str, str]], workers: int | None = None, **options: Any
) -> list[Result]:
    """`run` for many (program, test) pairs, `workers` at a time, in their order.

    `workers` is by default the number of processors: more would take time from
    each other. The options are those of `run`.
    """
    number = workers or os.cpu_count() or 1
    if number < 1:
        raise ValueError(f"workers is {workers}: it must be at least 1")
    obstacle()  # once, before the threads
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda job: run(*job, **options), jobs))
