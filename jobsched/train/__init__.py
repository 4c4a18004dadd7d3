"""What runs inside a replica: context, progress, checkpoints, parameter servers, elastic DDP and data shards.

An island: it imports `jobsched.contract`, the standard library, and (in `parameter_server`, `ddp`, `checkpoint`) torch
and pyzmq. `context`, `progress` and `rendezvous` need the standard library only. Nothing starts at import time, so that
a warm interpreter may import all of it and fork.
"""
