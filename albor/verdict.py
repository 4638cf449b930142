# Generated from book/verdict.md: edit the chapter, not this file.
"""The verdict: a judge in the program's process, and what the parent hears of it.

Notable:
- Test and nonce arrive in shared memory after the program's body has run. Only the
  interpreter's stack knows where, and no Python code can look there.
- The parent searches what it hears for the nonce, and believes nothing else.
- `judge` travels to the child as source, so it imports what it needs.
"""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Conversation", "judge", "killed_for_memory"]


def judge(program: str, verdict: int, secret: int) -> None:
    """In the worker: the program, then its test, then the nonce. Does not return.

    `verdict` is a socket to the parent, `secret` a file: 4096 bytes that begin with
    the nonce, then the test. Both are zero until the program's body has run.
    """
    import builtins
    import os
    import sys
    from mmap import ACCESS_READ, mmap

    def guard(event: str, arguments: object) -> None:
        # A tracer could jump over asserts, and gc would find the maps.
        if event in {
            "gc.get_objects",
            "gc.get_referents",
            "gc.get_referrers",
            "sys.addaudithook",
            "sys.monitoring.register_callback",
            "sys.setprofile",
            "sys.settrace",
        }:
            raise RuntimeError(f"{event} is closed in the sandbox")

    execute, translate, everything = exec, compile, vars(builtins)
    read, write, close, end = os.read, os.write, os.closerange, os._exit
    pid, getpid, dup = os.getpid(), os.getpid, os.dup
    intern, each, listed = sys.intern, map, list
    module = sys.modules["program"] = type(sys)("program")
    space = module.__dict__
    sys.addaudithook(guard)
    del guard  # who finds it in our frame can change its code
    write(verdict, b"R")  # ready: from here on the clock runs
    try:
        # fmt: off
        write(verdict, mmap(secret, 32, access=ACCESS_READ).read(  # 5. the nonce
            {pid: None}.__getitem__((  # a KeyError in a fork, which could guess
                getpid, execute(translate(  # 4. the test
                    mmap(secret, 0, access=ACCESS_READ, offset=4096).read(
                        read(verdict, write(verdict, (  # 3. b"ok" out, b"go" in
                            b"ok",
                            close(3, verdict), close(verdict + 1, 65536),
                            list(map(dup, [0] * 5)),  # the maps will close theirs
                            everything.update((
                                everything.copy(), execute(  # 2. the program
                                    translate(program, "<program>", "exec"), space
                                ),
                                listed(each(intern, everything)),  # TypeError for
                                listed(each(intern, space)),  # a key that can lie
                            )[0]),
                            space.update(__builtins__=everything),
                            getpid() == pid or end(0),  # a fork of it
                        )[0])) and None  # type: ignore[arg-type]  # read all
                    ), "<test>", "exec",
                ), space),
            )[0]()),
        ))
        # fmt: on
    except BaseException as error:
        try:
            if isinstance(error, MemoryError):
                space.clear()  # room to say so
            line, at = 0, error.__traceback__
            while at:
                if at.tb_frame.f_code.co_filename == "<test>":
                    line = at.tb_lineno
                at = at.tb_next
            text = str(error).strip().split("\n")[0][:500].replace("\0", "?")
            told = f"\0{type(error).__name__}\0{line}\0{text}"
            if getpid() == pid:
                write(verdict, told.encode("utf-8", "replace"))
        finally:
            end(1)
    end(0)


def killed_for_memory() -> int:
    """How often the system has killed a process for lack of memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class Conversation:
    """What the parent hears from one child, until it passed, ended or must end."""

    def __init__(
        self,
        verdict: socket.socket,
        lifeline: socket.socket,
        output: int,
        secret: int,
        test: bytes,
        nonce: bytes,
        used: Callable[[], int],
    ) -> None:
        self.verdict, self.lifeline, self.output = verdict, lifeline, output
        self.secret, self.test, self.nonce = secret, test, nonce
        self.used = used  # bytes of memory that the whole tree holds
        self.heard, self.printed = b"", b""
        self.told = self.stopped = ""
        self.seconds, self.size = 0.0, 0

    def hold(self, timeout: float, most: int, memory: int) -> None:
        """Listen, for `timeout` seconds from the worker's first byte."""
        poll = select.poll()
        for end in (self.verdict, self.lifeline, self.output):
            poll.register(end, select.POLLIN)
        began, asked, alive = time.monotonic(), False, True
        deadline, look = began + 60, began + 0.1
        while alive and not self.stopped and self.nonce not in self.heard:
            wait = max(0.0, min(deadline, look) - time.monotonic())
            for number, _ in poll.poll(1000 * wait + 1):
                try:
                    piece = os.read(number, 65536)
                except ConnectionError:
                    piece = b""
                if not piece:
                    poll.unregister(number)
                if number == self.output:
                    self.note(piece, most)
                elif number == self.lifeline.fileno():
                    self.told += piece.decode()
                    alive = False
                else:
                    if not self.heard:
                        began = time.monotonic()
                        deadline = began + timeout
                    self.heard += piece
            if len(self.heard) > 1 and not asked:
                asked = True
                os.pwrite(self.secret, self.test, 4096)
                os.pwrite(self.secret, self.nonce, 0)
                with contextlib.suppress(OSError):
                    self.verdict.send(b"go")
            if len(self.heard) > most:
                self.stopped = "output limit"
            now = time.monotonic()
            if now > look:
                look = now + 0.1
                if self.used() > memory:
                    self.stopped = "out of memory"
            if now > deadline:
                self.stopped = self.stopped or "timed out"
        self.seconds = time.monotonic() - began

    def note(self, piece: bytes, most: int) -> None:
        """Count what was printed, keep its end."""
        self.size += len(piece)
        self.printed = (self.printed + piece)[-10_000:]
        if self.size > most:
            self.stopped = "output limit"

    def drain(self, most: int) -> None:
        """Read what the dead left in the pipes."""
        os.set_blocking(self.output, False)
        self.verdict.setblocking(False)
        with contextlib.suppress(OSError):
            while piece := os.read(self.output, 65536):
                self.note(piece, most)
        with contextlib.suppress(OSError):
            while len(self.heard) <= most and (piece := self.verdict.recv(65536)):
                self.heard += piece

    def last_line(self) -> str:
        """Of what was printed."""
        lines = self.printed.decode("utf-8", "replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def outcome(
        self, timeout: float, test: str, starved: bool, output_kb: int
    ) -> tuple[str, str]:
        """Status and detail."""
        if self.stopped == "output limit":
            return self.stopped, f"more than {output_kb} kB of output"
        if self.nonce in self.heard:
            return "passed", ""
        if self.stopped == "timed out":
            return self.stopped, f"after {timeout:g} s"
        if self.stopped:
            return self.stopped, "the processes together held too much"
        status = int(self.told) if self.told.isdigit() else signal.SIGKILL
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU:
                return "timed out", "processor time"
            if number == signal.SIGKILL and starved:
                return "out of memory", "killed by the system"
            with contextlib.suppress(ValueError):
                return "crashed", signal.Signals(number).name
            return "crashed", f"signal {number}"
        parts = self.heard.decode("utf-8", "replace").split("\0")[-3:]
        if len(parts) < 3:
            code = os.WEXITSTATUS(status)
            return "failed", f"exited with code {code} before the test was done"
        name, line, text = parts
        if text.startswith("[Errno 12]"):  # an OSError for want of memory
            name = "MemoryError"
        detail = f"{name}: {text}" if text else name
        rows = test.split("\n")
        if line.isdigit() and 0 < int(line) <= len(rows):
            detail += f" (test, line {line}: {rows[int(line) - 1].strip()})"
        return ("out of memory" if name == "MemoryError" else "failed"), detail
