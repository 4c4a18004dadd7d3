"""Sessions over a socket, plain and with TLS: both ways at once, pings, ends, and a server that goes away."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage

from jobsched import errors
from jobsched.client.channel import Channel

Dial = Callable[[Callable[["Peer"], None]], Channel]


class Peer:
    """The server's end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.frames = sock, Connection(ConnectionType.SERVER)
        self.pongs: list[bytes] = []

    def send(self, event: Event) -> None:
        self.sock.sendall(self.frames.send(event))

    def events(self) -> Iterator[Event]:
        while data := self.sock.recv(65_536):
            self.frames.receive_data(data)
            for event in self.frames.events():
                if isinstance(event, Pong):
                    self.pongs.append(bytes(event.payload))
                else:
                    yield event


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    place = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", place / "key.pem", "-out",
                    place / "cert.pem", "-days", "2", "-subj", "/CN=localhost"], check=True, capture_output=True)
    return place


@pytest.fixture(params=["plain", "tls"])
def dial(request: pytest.FixtureRequest) -> Iterator[Dial]:
    """A channel to a server that does what it is told to, on a thread of its own."""
    threads: list[threading.Thread] = []
    wrong: list[Exception] = []

    def dial(serve: Callable[[Peer], None]) -> Channel:
        listener = socket.create_server(("127.0.0.1", 0))

        def run() -> None:
            sock, _ = listener.accept()
            if request.param == "tls":
                place = request.getfixturevalue("certificate")
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(place / "cert.pem", place / "key.pem")
                sock = context.wrap_socket(sock, server_side=True)
            with sock:
                try:
                    serve(Peer(sock))
                except Exception as exc:
                    wrong.append(exc)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        ours = socket.create_connection(listener.getsockname())
        if request.param == "tls":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            ours = context.wrap_socket(ours)
        return Channel(ours)

    yield dial
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []


def test_much_goes_both_ways_at_once(dial: Dial) -> None:
    """The server answers each piece before it reads the next, so both directions fill up."""

    def echo(peer: Peer) -> None:
        for event in peer.events():
            if isinstance(event, BytesMessage):
                peer.send(BytesMessage(b"\1" + event.data))
                peer.send(Ping(b"there?"))
            elif isinstance(event, TextMessage):
                assert json.loads(event.data) == {"end": True}
                peer.send(TextMessage('{"exit": 3}'))
            elif isinstance(event, CloseConnection):  # one that closed before would lose what is on its way
                break
        assert peer.pongs
        assert set(peer.pongs) == {b"there?"}

    channel = dial(echo)
    data = os.urandom(1 << 20) * 8

    def feed() -> None:
        channel.send(data)
        channel.end_input()

    feeding = threading.Thread(target=feed)
    feeding.start()
    got = b"".join(piece[1] for piece in iter(channel.receive, None))
    feeding.join(120)
    assert channel.code == 3
    assert got == data
    channel.hang_up()


def test_what_goes_wrong_is_raised(dial: Dial) -> None:
    def refuse(peer: Peer) -> None:
        peer.send(BytesMessage(b"\2oops"))
        peer.send(TextMessage(json.dumps({"error": {"code": "E500", "message": "no", "hint": "later"}})))

    channel = dial(refuse)
    assert channel.receive() == ("err", b"oops")
    with pytest.raises(errors.Conflict, match="no"):
        channel.receive()


def test_nothing_in_time_and_then_the_end(dial: Dial) -> None:
    go = threading.Event()

    def wait(peer: Peer) -> None:
        go.wait(120)
        peer.send(CloseConnection(1012))

    channel = dial(wait)
    with pytest.raises(TimeoutError):
        channel.receive(0.05)
    go.set()
    with pytest.raises(errors.Unreachable, match="ended the session"):
        channel.receive(120)
    with pytest.raises(errors.Unreachable):
        channel.send(b"late")
    channel.hang_up()


def test_a_server_that_is_gone_is_told(dial: Dial) -> None:
    channel = dial(lambda peer: None)
    with pytest.raises(errors.Unreachable):
        channel.receive(120)
    channel.hang_up()
