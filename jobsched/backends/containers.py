"""What engines of containers have in common: how they tell an end and a time, and how a signal gets in.

Used by adapters.
"""

from __future__ import annotations

import re
import signal
from datetime import datetime

SEND = r"""
for d in /proc/[0-9]*; do
  p=${d#/proc/}; m=
  if [ "$p" = 1 ] || [ "$p" = $$ ]; then continue; fi
  if [ "$2" = caught ]; then
    { while read -r k v; do if [ "$k" = SigCgt: ]; then m=$v; fi; done < "$d/status"; } 2>/dev/null
    if [ -z "$m" ] || [ $(( 0x${m#????????} >> ($1 - 1) & 1 )) = 0 ]; then continue; fi
  fi
  kill -"$1" "$p" 2>/dev/null && echo "$p"
done
"""
"""`/bin/sh -c SEND sh NUMBER caught|all` inside a container: to those processes that catch the signal, or to all."""


def exit_of(status: int) -> tuple[int | None, int | None]:
    """Exit code and signal, one of them None: engines say 128 + N for signal N."""
    number = status - 128
    return (None, number) if 0 < number < signal.SIGRTMIN and number in set(signal.Signals) else (status, None)


def instant(text: str) -> datetime:
    """An engine's time: RFC 3339 with up to nine digits of a second, of which datetime knows six."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text).replace("Z", "+00:00"))


SESSION = "JOBSCHED_SESSION"
HANG_UP = r"""
for d in /proc/[0-9]*; do
  p=${d#/proc/}
  if [ "$p" = $$ ]; then continue; fi
  { while IFS= read -r v || [ -n "$v" ]; do
    case "$v" in *"$1"*) kill -9 "$p"; break;; esac; done < "$d/environ"; } 2>/dev/null
done
true
"""
"""`/bin/sh -c HANG_UP sh JOBSCHED_SESSION=TOKEN` inside a container: an end to what was run with this variable."""
RELAY = r"""
for p in python3 python; do if command -v $p >/dev/null; then exec $p -c "$2" "$1"; fi; done
if command -v socat >/dev/null; then exec socat - "TCP:127.0.0.1:$1"; fi
if command -v nc >/dev/null; then exec nc 127.0.0.1 "$1"; fi
echo "there is neither python nor socat nor nc in the image, to reach port $1" >&2; exit 127
"""
"""`/bin/sh -c RELAY sh PORT RELAY_PYTHON` inside a container: stdin and stdout are a connection to a port in there."""
RELAY_PYTHON = """
import os, socket, sys, threading
def up():
    data = os.read(0, 65536)
    while data:
        sock.sendall(data)
        data = os.read(0, 65536)
    sock.shutdown(socket.SHUT_WR)
try:
    sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10)
except OSError as error:
    sys.exit("nothing listens on port %s there: %s" % (sys.argv[1], error))
sock.settimeout(None)
thread = threading.Thread(target=up)
thread.daemon = True
thread.start()
data = sock.recv(65536)
while data:
    while data:
        data = data[os.write(1, data):]
    data = sock.recv(65536)
os._exit(0)
"""


def relay(port: int) -> list[str]:
    """The command whose stdin and stdout are a connection to that port."""
    return ["/bin/sh", "-c", RELAY, "sh", str(port), RELAY_PYTHON]
