"""The beginning of the process: Ctrl-C and SIGTERM end it, from before the first heavy import on.

It imports nothing that takes time, so that there is hardly a moment at which a signal finds no handler.
"""

import os
import signal
import sys

# Seconds that an interrupted command has to leave by itself. Whatever is written is whole or absent at any time.
_PATIENCE = 1.0
_ENDING = (signal.SIGINT, signal.SIGTERM)
_received = 0
_said = False


def script() -> None:
    """The ``megu`` script, and ``python -m megu_cli``."""
    _listen()
    try:
        from megu_cli.cli.app import script as command

        command()
    except KeyboardInterrupt:  # outside of what the app guards
        _leave_at_once()


def interrupted() -> int:
    """The exit code of the signal that this process received; 0 if there was none."""
    return 128 + _received if _received else 0


def say(line: str = "interrupted") -> None:
    """Say on stderr, once, that the process was interrupted."""
    global _said
    if not _said:
        _said = True
        try:
            os.write(2, f"{line}\n".encode())
        except OSError:  # closed
            return


def _listen() -> None:
    """Handle the signals, but those that the caller wants ignored, as a shell does for what runs in its background."""
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    if os.name == "posix":
        import _thread

        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        _thread.start_new_thread(_watch, (reading,))
        os.register_at_fork(after_in_child=_let_go)


def _handle(number, frame):  # type: ignore[no-untyped-def]  # without the import of types
    """End an import, in which KeyboardInterrupt may become anything, at once; elsewhere raise KeyboardInterrupt."""
    global _received
    again, _received = _received, _received or number
    while frame and not again:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            break
        frame = frame.f_back
    if again or frame:
        _leave_at_once()
    raise KeyboardInterrupt


def _watch(reading: int) -> None:
    """End the process where KeyboardInterrupt does not: within a long call of C, or caught on its way."""
    import time

    global _received
    while data := os.read(reading, 1):
        if data[0] in _ENDING and signal.getsignal(data[0]) is _handle:
            time.sleep(_PATIENCE)
            _received = _received or data[0]
            _leave_at_once()


def _leave_at_once() -> None:
    say()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            continue
    os._exit(interrupted())


def _let_go() -> None:
    """Leave a forked process as Python starts one."""
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGINT) is _handle:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
