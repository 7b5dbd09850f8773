"""One side of a comparison, as a process that holds no clock.

It is asked line by line over a pipe (JSON both ways) to take inputs from files, to run, and to hand results back. How long a
run took is read here, from outside: the processor time of the whole process, all its threads, by the kernel's own clock; and
the wall time of question and answer.
"""

import json
import os
import select
import subprocess
import time


class Refused(Exception):
    """What a contestant says instead of an answer."""


class Gone(Refused):
    """Its process ended."""


# Seconds that an idle process may take to end, and one that was stopped in its work is given.
PATIENCE = 5
# Seconds that one question may take; the longest of the table takes a few.
LIMIT = 600


class Contestant:
    def __init__(self, command, threads, cpus=None, environment=None):
        # One count for every library that reads one.
        counts = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MATMUL_NUM_THREADS", "PEER_THREADS", "LP_NUM_THREADS")
        environment = {
            **os.environ,
            **{name: str(threads) for name in counts},
            **(environment or {}),
        }
        pin = (lambda: os.sched_setaffinity(0, cpus)) if cpus else None
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            preexec_fn=pin,
            bufsize=0,
            # Who stops the judge from a terminal stops it alone: it ends the others.
            start_new_session=True,
        )
        self.said = b""
        # Linux's clock of another process: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED).
        self.clock = (~self.process.pid << 3) | 2
        try:
            self.about = self.ask("hello")
        except BaseException:
            self.end()
            raise

    def ask(self, what, **fields):
        try:
            self.process.stdin.write((json.dumps({"do": what, **fields}) + "\n").encode())
            line = self.line(time.monotonic() + LIMIT)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.process.kill()
            raise Gone(f"{self.process.args[0]} gave no answer within {LIMIT} s when asked to {what}")
        if not line:
            raise Gone(f"{self.process.args[0]} ended while asked to {what}")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            # What else it says would be taken for the answer to the next question.
            self.process.kill()
            raise Gone(f"{self.process.args[0]} does not answer in JSON when asked to {what}")
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def line(self, deadline):
        """A whole line, nothing where the process ended, `None` past the deadline."""
        while b"\n" not in self.said:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                return b""
            self.said += more
        line, _, self.said = self.said.partition(b"\n")
        return line

    def alive(self):
        return self.process.poll() is None

    def cpu(self):
        """Seconds of processor time so far, of all threads."""
        try:
            return time.clock_gettime(self.clock)
        except OSError:
            raise Gone(f"{self.process.args[0]} is gone") from None

    def timed(self, what, **fields):
        """Processor and wall seconds from question to answer."""
        cpu, wall = self.cpu(), time.perf_counter()
        self.ask(what, **fields)
        return self.cpu() - cpu, time.perf_counter() - wall

    def end(self):
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                # It died before it read what it was asked.
                pass
        try:
            self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
