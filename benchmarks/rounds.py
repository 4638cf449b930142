"""The arms of `benchmarks.training` as processes, and the turns that they take."""

import dataclasses
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from albor.artifacts import write_json
from albor.config import project_path
from benchmarks.arms import Job

# Lines that say why a process ended; the second is the watchdog's of a lock.
END = re.compile(r"[\w.]+(Error|Unsupported)\b|Timeout \(")


class Worker:
    """An arm in a process of its own; what goes wrong there is its result."""

    def __init__(self, name: str, kind: str, job: Job, timeout: float) -> None:
        folder, root = Path(job.folder), project_path(".")
        slug = re.sub(r"\W+", "-", name)
        path = folder / f"{slug}.json"
        path.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job.threads),
            "PYTHONPATH": os.pathsep.join(
                [str(root), os.environ.get("PYTHONPATH", "")]
            ),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled" / slug),  # cold
            "TORCHINDUCTOR_COMPILE_THREADS": "4",  # others compile beside it
            "HF_HUB_OFFLINE": "1",
        }
        self.said = (folder / f"{slug}.err").open("w+", encoding="utf-8")
        self.timeout = timeout
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.measure", kind, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            cwd=root,
            env=environment,
            start_new_session=True,  # so that it ends with all that it has begun
        )
        self.status = ""  # what it said when it was ready, or could not be

    def listen(self) -> dict[str, Any]:
        """The next line that it prints, or why there is none."""
        assert self.process.stdout
        late = threading.Event()

        def end() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(self.timeout, end)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        code = self.process.wait()
        if late.is_set():
            return {"status": f"failed: not done after {self.timeout:g} s"}
        self.said.seek(0)
        lines = self.said.read().strip().splitlines()
        named = [x for x in lines if END.match(x)]
        last = [f"ended with {code}, without a word", *lines[-1:], *named][-1]
        if last.startswith("Timeout"):
            # The stacks of all threads follow, that of the main one at the end.
            tops = [b for a, b in pairwise(lines) if "recent call first" in a]
            last += re.sub(r"^ +(File \").*/", r" \1", tops[-1]) if tops else ""
        return {"status": f"failed: {last}"}

    def prepare(self) -> None:
        """Wait until it is built and compiled."""
        self.status = self.status or self.listen()["status"]

    def turn(self) -> dict[str, Any]:
        """Let it measure; everybody else waits."""
        self.prepare()
        if self.status != "ready":
            return {"status": self.status}
        assert self.process.stdin
        try:
            self.process.stdin.write("turn\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it will be told what happened
        return self.listen()

    def kill(self) -> None:
        """End it, and the compilers that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it, and wait for its end."""
        self.kill()
        self.process.communicate()
        self.said.close()


def run_rounds(
    arms: dict[str, tuple[str, dict[str, Any]]],
    job: Job,
    rounds: int,
    *,
    shuffle: int | None = None,
    timeout: float = 3600.0,
    together: bool = False,
    inside: Sequence[str] = (),
    sizes: dict[str, int] | None = None,
    keep: Path | None = None,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """All arms, `rounds` times. `arms`: name -> (arm to run, its settings).

    `together`: they are prepared side by side and then take turns, for a machine
    with a GPU and many cores. Else an arm is a new process in every round.
    `timeout`: seconds that an arm may take; when they share a device, that it may
    have the device at a time, while the others wait for longer than all of these.
    `inside`: arms with steps after the timed ones; none means all. `sizes`:
    micro-batches that are known. `keep`: a file for what there is after each turn.
    Returns the rounds, and the ceilings before and after them.
    """
    draw, sizes = random.Random(shuffle), dict(sizes or {})
    found: list[dict[str, Any]] = []
    job = dataclasses.replace(job, hold=timeout)
    if together:
        timeout *= len(arms) + 1  # the ceilings are one more

    def start(name: str) -> Worker:
        kind, settings = arms[name]
        told = dataclasses.replace(
            job,
            settings=settings,
            after=job.after if not found and name in (inside or arms) else 0,
            micro_batch=sizes.get(name, job.micro_batch),  # looked for once
        )
        return Worker(name, kind, told, timeout)

    with ExitStack() as stack:
        began = time.monotonic()
        limit = stack.enter_context(
            closing(Worker("ceilings", "ceilings", job, timeout))
        )
        ready = {  # these compile while the ceilings are measured
            name: stack.enter_context(closing(start(name)))
            for name in arms
            if together
        }
        limits = {"start": limit.turn()}
        for worker in ready.values():
            worker.prepare()
        if together:
            spent = time.monotonic() - began
            print(f"{len(ready)} arms are prepared  ({spent:.0f} s)", flush=True)
        for number in range(rounds):
            order = list(arms)
            if shuffle is not None:
                draw.shuffle(order)
            load = round(os.getloadavg()[0], 1)
            results: dict[str, dict[str, Any]] = {}
            for name in order:
                earlier = (
                    found[0]["arms"][name] if found else {"status": "measured"}
                )
                if earlier["status"] != "measured":
                    continue  # it will not run in this round either
                began = time.monotonic()
                if together:
                    one = ready[name].turn()
                else:
                    with closing(start(name)) as worker:
                        one = worker.turn()
                results[name] = one
                if keep:
                    write_json(keep, [*found, {"order": order, "arms": results}])
                said = one["status"]
                if said == "measured":
                    sizes[name] = one["micro_batch"]
                    said = f"{statistics.median(one['ms']):,.1f} ms a step"
                spent = time.monotonic() - began
                print(
                    f"round {number + 1}  {name:<24} {said}  ({spent:.0f} s)",
                    flush=True,
                )
            found.append({"order": order, "load": load, "arms": results})
        limits["end"] = limit.turn()
    return found, limits
