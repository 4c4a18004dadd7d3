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
