"""The process that encrypts and opens, as seen from outside; `he_child` is what runs in it.

    with Worker() as worker:
        blob = worker.encrypt(BFV, "seeded", secret, values)

Raw bytes go in and out, with their length in front; nothing is pickled. A child that ends or takes too long is an error
that says so, and the next call starts another one: requests are complete in themselves, so nothing is lost with it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from splitfl.aggregation.he_frames import ANSWER, fill, request
from splitfl.aggregation.lattice import BFV, Buffer, Form, Scheme, seeds_size, words_size
from splitfl.errors import PeerError, ResourceError, UsageError, WireError, printable

_LIMIT_S = 600.0
_END_S = 5.0
_LONGEST_SENTENCE = 4096
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Whole = npt.NDArray[np.int32]


class Worker:
    """A child process with TenSEAL in it, started when it is first needed. Calls come from one thread at a time.

    Args:
        limit_s: longest time that one call may take.

    Raises:
        UsageError: TenSEAL is not installed.
    """

    def __init__(self, *, limit_s: float = _LIMIT_S) -> None:
        for library in ("tenseal", "zstandard"):
            if importlib.util.find_spec(library) is None:
                raise UsageError(
                    f"Encrypted sums need {library}, which is not installed.", hint="pip install 'splitfl[he]'"
                )
        self._limit_s = limit_s
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return self._child.pid if self._child is not None else None

    def close(self) -> None:
        """End the child, and with it the key that it holds. The next call would start another."""
        child, self._child = self._child, None
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):  # what was not yet written to a child that is gone
                _open(pipe).close()
        try:
            child.wait(_END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def encrypt(self, scheme: Scheme, form: Form, secret: bytes, values: Whole) -> bytes:
        """An update as ciphertexts: seeds, then words; see `lattice`.

        Args:
            secret: 32 bytes from which the secret key follows.
            values: int32 [V], each within what the scheme can hold.

        Raises:
            ResourceError: the child did not answer.
        """
        body = np.ascontiguousarray(values, dtype="<i4")
        try:
            return bytes(self._ask("encrypt", scheme, form, secret, len(values), 0, [body.data.cast("B")]))
        except WireError as error:
            raise ResourceError(
                f"The update could not be encrypted. {error.problem}", hint="try again; look at free memory"
            ) from None

    def open(
        self, scheme: Scheme, form: Form, secret: bytes, values: int, seeds: Sequence[Buffer], words: Buffer
    ) -> Whole:
        """The whole numbers in a sum; those of CKKS rounded to their grid.

        Args:
            values: V, how many there are.
            seeds: of each update in the sum; in the public form empty.
            words: of the sum.

        Returns:
            int32 [V].

        Raises:
            WireError: the sizes are wrong, or it does not open; also if the child ended or hung on it.
        """
        blocks = scheme.blocks(values)
        size = seeds_size(blocks, form)
        if memoryview(words).nbytes != words_size(blocks, form) or any(len(each) != size for each in seeds):
            raise WireError("A sum does not have the size that its round has.", expected=f"{blocks} blocks, {form}")
        if form == "seeded" and not seeds:
            raise WireError("A sum has no updates in it.", expected="at least one")
        answer = self._ask("open", scheme, form, secret, values, len(seeds), [*seeds, words])
        if len(answer) != 4 * values:
            raise WireError("The process that opens sums answered with another length.", expected=f"{values} values")
        return np.frombuffer(answer, dtype="<i4")

    def check(self) -> None:
        """Try both schemes and both forms on a few values.

        Raises:
            PeerError: this build of TenSEAL does not do what splitfl relies on.
        """
        self._ask("check", BFV, "seeded", bytes(32), 0, 0, [])

    def _ask(
        self, op: str, scheme: Scheme, form: Form, secret: bytes, values: int, updates: int, parts: Sequence[Buffer]
    ) -> bytearray:
        child = self._started()
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(self._limit_s, end)
        timer.start()
        try:
            to, back = _open(child.stdin), _open(child.stdout)
            to.write(request(op, scheme, form, secret, values, updates, sum(memoryview(p).nbytes for p in parts)))
            for part in parts:
                to.write(part)
            to.flush()
            status, length = ANSWER.unpack(fill(back, ANSWER.size))
            limit = words_size(scheme.blocks(values), "public") + 4 * values + _LONGEST_SENTENCE
            if length > limit:
                raise EOFError
            body = fill(back, length)
        except (OSError, EOFError):
            raise self._lost(child, late) from None
        except BaseException:  # broken off in the middle of an exchange: what comes next would be its rest
            child.kill()
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()
        if status != b"+":
            raise WireError(printable(body.decode("utf-8", "replace")))
        return body

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._child is None:
            # -P: a file in the current folder must not be taken for a library.
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "splitfl.aggregation.he_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **dict.fromkeys(_THREAD_VARIABLES, "1")},
                start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
            )
        return self._child

    def _lost(self, child: subprocess.Popen[bytes], late: threading.Event) -> PeerError:
        child.kill()
        self.close()
        why = f"took longer than {self._limit_s:g} s" if late.is_set() else f"ended (status {child.returncode})"
        return WireError(
            f"The process that encrypts and opens {why}.",
            expected="an answer",
            hint="another one is started for the next call; look at free memory",
        )


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise TypeError("the child was started without pipes")
    return pipe
