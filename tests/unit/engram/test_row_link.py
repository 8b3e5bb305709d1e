"""A link fills the places of its portions and nothing else, however the bytes come."""

from __future__ import annotations

import select
import socket
import zlib
from collections.abc import Iterator

import pytest

from moeray.engram.row_link import Portion, RowLink, RowsRefused
from moeray.engram.row_wire import CHECKSUM, WireError, answer_head, refusal


@pytest.fixture
def ends() -> Iterator[tuple[RowLink, socket.socket]]:
    ours, theirs = socket.socketpair()
    link = RowLink(3, "somewhere:1", ours)
    yield link, theirs
    link.close()
    theirs.close()


def asked(link: RowLink, number: int, sizes: tuple[int, ...] = (5, 3)) -> tuple[Portion, list[bytearray]]:
    rooms = [bytearray(size) for size in sizes]
    portion = Portion(number, (0,), [memoryview(room) for room in rooms])
    link.ask(b"request %d;" % number, portion)
    return portion, rooms


def answer(number: int, body: bytes) -> bytes:
    return answer_head(number, len(body)) + body + CHECKSUM.pack(zlib.crc32(body))


def test_an_answer_that_comes_byte_by_byte_is_whole(ends: tuple[RowLink, socket.socket]) -> None:
    link, server = ends
    portion, rooms = asked(link, 1)
    assert link.pump() == select.POLLIN
    assert server.recv(100) == b"request 1;"
    for byte in answer(1, b"abcdefgh"):
        assert link.pump() == select.POLLIN
        assert list(link.pending) == [portion]
        server.sendall(bytes([byte]))
    assert link.pump() == 0
    assert not link.pending
    assert [bytes(room) for room in rooms] == [b"abcde", b"fgh"]


def test_answers_that_come_together_are_told_apart(ends: tuple[RowLink, socket.socket]) -> None:
    link, server = ends
    first, second = asked(link, 1)[1], asked(link, 2, (4,))[1]
    link.pump()
    server.sendall(answer(1, b"abcdefgh") + answer(2, b"ijkl"))
    assert link.pump() == 0
    assert [bytes(room) for room in (*first, *second)] == [b"abcde", b"fgh", b"ijkl"]


def test_a_refusal_is_an_error_with_the_servers_words(ends: tuple[RowLink, socket.socket]) -> None:
    link, server = ends
    portion, _ = asked(link, 7)
    server.sendall(refusal(7, "1 rows of a are not held"))
    with pytest.raises(RowsRefused, match="1 rows of a are not held"):
        link.pump()
    assert list(link.pending) == [portion]  # so its rows are asked of another


@pytest.mark.parametrize("sent", [answer(2, b"abcdefgh"), answer(1, b"abcdefghi"), answer(1, b"abcdefgh")[:-1] + b"?"])
def test_what_is_not_the_answer_is_an_error(ends: tuple[RowLink, socket.socket], sent: bytes) -> None:
    link, server = ends
    asked(link, 1)
    server.sendall(sent)
    with pytest.raises(WireError):
        link.pump()


def test_an_end_of_file_is_an_error_only_while_something_is_awaited(ends: tuple[RowLink, socket.socket]) -> None:
    link, server = ends
    server.shutdown(socket.SHUT_WR)
    assert link.pump() == 0
    asked(link, 1)
    with pytest.raises(ConnectionResetError):
        link.pump()
