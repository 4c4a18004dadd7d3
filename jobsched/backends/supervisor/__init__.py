"""The supervisor: a small standing process, one per home directory, that keeps the replicas of the local backend.

It is not the server: killing or upgrading the server never touches a replica. `local.LocalBackend` starts it on demand
(`python -m jobsched.backends.supervisor HOME`) and talks to it over a unix socket; so do the actors of the Ray backend,
one supervisor per node. It never decides anything; it never
imports more than the standard library, because it must start in a blink and stay small.

    protocol.py     what is said on the socket, and where files lie     journal.py   its state on disk
    server.py       the socket: who asks, who is told                   loop.py      the event loop and its timers
    keeper.py       starting, stopping, ending, reporting               replica.py   one replica and its report
    processes.py    what /proc tells; who may be killed                 client.py    the other end of the socket
    limits.py       cgroups and rlimits                                 replica_log.py  log files with true offsets
    warm.py         the warm interpreter (runs under the user's Python) warm_pool.py  the supervisor's side of it
    stacks.py       py-spy or SIGQUIT                                   sweeper.py   deletes old logs and scratch
    startable.py    whether an order can be carried out, in words
"""
