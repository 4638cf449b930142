# Generated from book/room.md: edit the chapter, not this file.
"""The child's side of the sandbox: a closed room, and those who guard it.

Notable:
- Namespaces give the program a root folder that holds Python and an empty /tmp; no
  network, no /proc, no process but its own. Limits make the rest scarce.
- A broken lifeline, or the end of process 1, ends all.
- Only the source of these functions travels to the child, so each one imports what
  it needs. `albor.sandbox` starts them, and lists what is covered and what is not.
"""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

from albor.verdict import judge

__all__ = [
    "below",
    "confine",
    "furnish",
    "init",
    "libc",
    "own_tasks",
    "stranger",
    "supervise",
    "sweep",
]


def libc(name: str, *arguments: Any) -> None:
    """Call the C library; an OSError says which call failed, and why."""
    import ctypes
    import os

    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def furnish(megabytes: int) -> None:
    """In init: a root folder with Python, read-only, and an empty /tmp."""
    import os

    READ_ONLY, NO_SUID, REMOUNT, BIND = 1, 2, 32, 4096
    DEEP, PRIVATE = 16384, 1 << 18
    bare = NO_SUID | 4  # nor devices

    def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
        texts = (os.fsencode(text) for text in (source, target, kind))
        libc("mount", *texts, flags, os.fsencode(data))

    library = os.path.dirname(os.__file__)
    shown = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store"}
    shown |= {os.path.dirname(library), "/etc/ld.so.cache", "/usr/share/zoneinfo"}
    shown |= {f"/dev/{x}" for x in ("null", "zero", "full", "random", "urandom")}
    real = {path: os.path.realpath(path) for path in shown if os.path.exists(path)}
    links = {path: os.readlink(path) for path in real if os.path.islink(path)}
    mount("none", "/", "", DEEP | PRIVATE, "")
    mount("tmpfs", "/tmp", "tmpfs", bare, "size=1m,mode=755")
    os.mkdir("/tmp/.old")
    os.chdir("/tmp")
    libc("pivot_root", b".", b".old")
    os.chdir("/")
    os.mkdir("/tmp")
    room = f"size={megabytes}m,nr_inodes=4096,mode=1777"
    mount("tmpfs", "/tmp", "tmpfs", bare, room)
    for path in sorted(real):  # also where Python lies in /tmp
        if any(path.startswith(f"{other}/") for other in real):
            continue
        if path in links and path.count("/") == 1:  # /lib -> usr/lib
            os.symlink(links[path], path)
            continue
        if os.path.isdir(f"/.old{real[path]}"):
            os.makedirs(path)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT))
        mount(f"/.old{real[path]}", path, "", BIND | DEEP, "")
        kept = os.statvfs(path).f_flag & 0xC0F  # a namespace may not drop flags
        kept |= NO_SUID if path.startswith("/dev/") else bare
        mount("none", path, "", REMOUNT | BIND | READ_ONLY | kept, "")
    sites = [f"{library}/{name}-packages" for name in ("site", "dist")]
    for path in (*sites, "/usr/lib/python3/dist-packages"):
        if os.path.isdir(path):
            mount("tmpfs", path, "tmpfs", READ_ONLY | bare, "size=4k")
    libc("umount2", b"/.old", 2)
    os.rmdir("/.old")
    os.mkdir("/room")
    mount("none", "/", "", REMOUNT | BIND | READ_ONLY | bare, "")
    mount("/", "/room", "", BIND | DEEP, "")
    os.chroot("/room")  # in a changed root no user namespace may be made
    os.chdir("/tmp")


def confine(job: dict[str, Any]) -> None:
    """In the worker: limits, another user, no privileges."""
    import os
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.environ.pop("LD_LIBRARY_PATH", None)  # was for Python alone
    for name, value in job["limits"].items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value - (name == "CPU"), value))  # SIGXCPU first
    keep = 1 << 2 if job["read_private"] else 0  # CAP_DAC_READ_SEARCH
    if keep:
        libc("prctl", 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    if job["uid"]:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    if job["linux"]:
        sets = keep.to_bytes(4, "little") * 2 + bytes(16)
        libc("capset", (0x20080522).to_bytes(8, "little"), sets)
        libc("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which setuid took away
        libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def stranger() -> int:
    """The number of a user that nobody is, where we may become one; else 0."""
    if os.getuid():
        return 0
    many = 2**32 - 1
    with contextlib.suppress(OSError):
        if Path("/proc/self/setgroups").read_text().strip() == "deny":
            return 0
        rows = Path("/proc/self/uid_map").read_text().splitlines()
        many = max(sum(map(int, row.split()[::2])) for row in rows)
    return many // 2 + secrets.randbelow(many // 4) if many > 4 else 0


def own_tasks() -> int:
    """Threads that this user runs: limits on processes count them all."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.getuid():
                count += len(os.listdir(process / "task"))
    return count or 2000


def init(job: dict[str, Any]) -> None:
    """Process 1 of the room: start the worker, wait for its end, report it."""
    import os
    import signal

    if job["linux"]:
        libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        libc("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no ptrace from inside
    if job["mount"]:
        libc("unshare", 0x00020000)
        furnish(job["disk_mb"])
    else:
        os.chdir(job["folder"])
    worker = os.fork()
    if worker == 0:
        os.setsid()
        confine(job)
        os.close(job["lifeline"])
        judge(job["program"], job["verdict"], job["secret"])
    os.close(job["secret"])
    os.close(job["verdict"])
    pid = 0
    while pid != worker:
        pid, status = os.wait()
    if not job["linux"]:
        os.killpg(worker, signal.SIGKILL)
    os.write(job["lifeline"], b"%d" % status)
    os._exit(0)


def below(pid: int) -> list[int]:
    """The processes that descend from one, as far as /proc knows."""
    import os

    family = [pid]
    for one in family:  # grows as we go: a chain of forks may be deep
        try:
            for thread in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{thread}/children") as file:
                    family += map(int, file.read().split())
        except OSError:  # it is gone
            continue
    return family[1:]


def sweep() -> None:
    """Kill everything below this process, and bury it."""
    import os
    import signal

    def send(pids: set[int], number: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    while True:
        seen: set[int] = set()
        while new := set(below(os.getpid())) - seen:
            send(new, signal.SIGSTOP)  # what is stopped cannot fork
            seen |= new
        send(seen, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:  # all that are dead, in one go
                pass
        except ChildProcessError:
            return


def supervise(job: dict[str, Any]) -> None:
    """Enter the namespaces, start init; when the lifeline breaks, end it all."""
    import contextlib
    import os
    import select
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if job["linux"]:
            libc("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
            users = (f"{i} {i} 1" for i in (os.getuid(), os.getgid()))
            maps = dict(zip(("uid_map", "gid_map"), users, strict=True))
            libc("unshare", job["unshare"])
            shared = "/proc/sys/kernel/shmall"  # of this namespace
            if job["unshare"] & 0x10000000:
                for name, text in ({"setgroups": "deny"} | maps).items():
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(text)
            if job["unshare"] & 0x08000000:
                with contextlib.suppress(OSError), open(shared, "w") as file:
                    file.write("0")  # pages that outlive their processes
        first = os.fork()
        if first == 0:
            init(job)
    except BaseException as error:
        os.write(job["lifeline"], f"!{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.close(job["secret"])
    os.close(job["verdict"])
    poll = select.poll()
    poll.register(job["lifeline"], select.POLLIN)
    gone = 0
    while not gone and not poll.poll(50):
        gone = os.waitpid(first, os.WNOHANG)[0]
    if not gone:
        os.kill(first, signal.SIGKILL)
    sweep()
    if job["folder"]:
        import shutil  # not for every run: it takes five milliseconds

        for where, folders, _ in os.walk(job["folder"]):
            for path in (os.path.join(where, name) for name in folders):
                if not os.path.islink(path):
                    os.chmod(path, 0o700)
        shutil.rmtree(job["folder"], ignore_errors=True)
    os._exit(0)
