"""A fault at one of this process's system calls that change the disk. For forked children: what is armed stays armed.

The calls are met where Python makes them. An audit hook sees files opened for writing, renames, removals, folders made
and removed, truncations and changed modes and times before they happen, whoever makes them; writes, flushes and an open
file's truncation have no audit event, so `open` and `os.fsync` are replaced. `test_the_set_of_calls_is_whole` compares
with what the kernel saw.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

CHANGES = {
    "os.rename": "replace",
    "os.remove": "unlink",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.truncate": "truncate",
    "os.chmod": "chmod",
    "os.chown": "chown",
    "os.utime": "utime",
    "os.link": "link",
    "os.symlink": "symlink",
    "os.setxattr": "setxattr",
    "os.removexattr": "removexattr",
}
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What needs room on the disk; a full disk still removes and truncates files.
TAKES_ROOM = {"open", "write", "fsync", "replace", "mkdir"}


@dataclass(frozen=True)
class Call:
    """A system call that changes the disk: what it does, to which path (a rename's new one), with how many bytes."""

    kind: str
    path: str
    size: int = 0


@dataclass(frozen=True)
class Fault:
    """What happens at a call.

    Attributes:
        sent: a signal for this process, or None.
        error: an errno for the call, or 0.
        at: at which call, counted from 1.
        kind: count only calls of this kind.
        half: a write puts half of its bytes into the file first.
        lasting: every later call that needs room fails as well, as on a full disk.
        act: is called, and the call is made after it.
        most: all writes take only so many bytes at most, from one up; `at` does not matter then.
    """

    at: int
    sent: signal.Signals | None = None
    error: int = 0
    kind: str | None = None
    half: bool = False
    lasting: bool = False
    act: Callable[[], Any] | None = None
    most: int = 0

    def __str__(self) -> str:
        what = self.sent.name if self.sent else errno.errorcode.get(self.error, "act")
        return f"{what} {'inside' if self.half else 'at'} {self.kind or 'call'} {self.at}"


@dataclass
class Injector:
    """Counts the calls below `root` and lets `fault` happen; `calls` is what was met."""

    root: Path
    fault: Fault | None = None
    calls: list[Call] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    # What is killed here is a process, not the machine: flushing would cost time and show nothing.
    flushes: ClassVar[bool] = False
    _mutex: Any = field(default_factory=threading.RLock)
    _count: int = 0
    _refuse: bool = False

    def arm(self) -> Injector:
        """Meet the calls of this process from now on."""
        self._originals = open, os.fsync
        builtins.open = io.open = self._open
        os.fsync = self._fsync  # type: ignore[assignment]
        sys.addaudithook(self._hook)
        return self

    def inside(self, path: str) -> bool:
        return f"{path}/".startswith(f"{self.root}/")

    def reach(self, call: Call, part: Callable[[], Any] | None = None) -> Any:
        """A call is about to be made.

        Args:
            part: does half of it.

        Returns:
            what `part` returned where the caller is not to make the call itself.
        """
        if not self.inside(call.path):
            return None
        with self._mutex:
            self.calls.append(call)
            fault = self.fault
            if fault is None:
                return None
            if self._refuse and call.kind in TAKES_ROOM:
                raise _refusal(fault.error, call)
            if fault.kind not in (None, call.kind):
                return None
            self._count += 1
            if self._count != fault.at:
                return None
            taken = part() if fault.half and part else None
            if fault.error:
                self._refuse = fault.lasting
                if taken is not None:
                    # The system takes what fits, and refuses what comes after that.
                    self._refuse = True
                    return taken
                raise _refusal(fault.error, call)
            if fault.act:
                fault.act()
            if fault.sent:
                os.kill(os.getpid(), fault.sent)
            return taken

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not isinstance(flags, int):
                return
            if flags & FOR_WRITING:
                self.reach(Call("open", _absolute(path)))
            elif self.inside(name := _absolute(path)):
                self.opened.append(name)
        elif event in CHANGES:
            paths = [_absolute(path, folder) for path, folder in _names(event, arguments)]
            # Of a rename the new name; the old one if only that is ours. What can't succeed changes nothing.
            path = next((path for path in reversed(paths) if self.inside(path)), "")
            if event == "os.mkdir" and (Path(path).exists() or not Path(path).parent.exists()):
                return
            if event == "os.remove" and not os.path.lexists(path):
                return
            self.reach(Call(CHANGES[event], path))

    def _fsync(self, descriptor: int) -> None:
        self.reach(Call("fsync", _absolute(descriptor)))
        if self.flushes:
            self._originals[1](descriptor)

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **options: Any) -> Any:
        writing = set(mode) & set("wax+")
        if not writing or isinstance(file, int) or not self.inside(_absolute(file)):
            return self._originals[0](file, mode, buffering, *more, **options)
        raw = _File(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **options)


class _File(io.FileIO):
    """A file whose writes and truncations are met."""

    def __init__(self, injector: Injector, path: Any, mode: str) -> None:
        self._injector, self._path = injector, _absolute(path)
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        plain = super().write
        if (fault := self._injector.fault) and fault.most:
            view = view[: 1 + len(self._injector.calls) % fault.most]
        call = Call("write", self._path, len(view))
        taken = self._injector.reach(call, lambda: plain(view[: len(view) // 2]) if len(view) > 1 else None)
        return plain(view) if taken is None else taken

    def truncate(self, size: int | None = None) -> int:
        self._injector.reach(Call("truncate", self._path))
        return super().truncate(size)


def _names(event: str, arguments: tuple[Any, ...]) -> list[tuple[Any, int]]:
    """The paths of an audit event, each with the descriptor of the folder that it starts at, or -1."""
    if event in ("os.rename", "os.link"):
        return [(arguments[0], arguments[2]), (arguments[1], arguments[3])]
    if event == "os.symlink":
        return [(arguments[1], arguments[2])]
    in_folder = event in ("os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.utime")
    return [(arguments[0], arguments[-1] if in_folder else -1)]


def _absolute(path: Any, folder: int = -1) -> str:
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    base = _absolute(folder) if folder >= 0 else ""
    # Path.resolve would follow links.
    return os.path.abspath(os.path.join(base, os.fsdecode(path)))  # noqa: PTH100, PTH118


def _refusal(code: int, call: Call) -> OSError:
    """As Python raises it: calls on an open file know no name."""
    if call.kind in ("write", "fsync", "truncate"):
        return OSError(code, os.strerror(code))
    return OSError(code, os.strerror(code), call.path)
