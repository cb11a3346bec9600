"""Work that can be paused from any depth: a generator whose ``yield`` may stand deep inside a library's calls.

The work runs in a thread of its own, but only while ``resume`` waits for it, so that never two pieces of work run
at once; what it holds on its stack stays there while it is paused.
"""

import threading
from collections.abc import Callable


class _Closed(BaseException):
    """Unwinds work that is given up; no ``except Exception`` on its way holds it."""


class Pausable:
    """One piece of work. ``resume`` and ``close`` are called from outside it, ``pause`` from inside."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.done = False
        self._work, self._error = work, None  # type: Callable[[], None], BaseException | None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def resume(self) -> None:
        """Run the work until it pauses or ends. What it raises is raised here."""
        if self.done:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pausable", daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # else this frame and the error hold each other, and all that the work held

    def pause(self) -> None:
        """Hand control back to ``resume`` until it is called again."""
        self._back.release()
        self._go.acquire()
        if self._closing:
            raise _Closed

    def close(self) -> None:
        """Give the work up at the place where it is paused; nothing happens if it has ended or never begun."""
        self._closing = True
        if self._thread is not None and not self.done:
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except _Closed:
            pass
        except BaseException as error:  # handed over, whatever it is
            self._error = error
        finally:
            self.done = True
            self._back.release()
