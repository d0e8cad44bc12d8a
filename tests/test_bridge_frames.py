"""The frames of RFC 6455: what is taken, what is refused, and with which code."""

from __future__ import annotations

import asyncio
import os
import struct
import tracemalloc
import zlib

import pytest
from aiohttp import EofStream
from aiohttp._websocket.reader import WebSocketDataQueue
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import WebSocketError, WebSocketReader

from django_aioserve.bridge.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    FAIL,
    PING,
    PONG,
    TEXT,
    Deflater,
    FrameReader,
    StrictReader,
    close_payload,
    frame_header,
    is_close_code,
)

MASK = b"\x0f\xf0\x55\xaa"


def mask(payload: bytes, key: bytes = MASK) -> bytes:
    return bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


def client_frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    if len(payload) < 126:
        header = struct.pack("!BB", first, 0x80 | len(payload))
    elif len(payload) < 1 << 16:
        header = struct.pack("!BBH", first, 0xFE, len(payload))
    else:
        header = struct.pack("!BBQ", first, 0xFF, len(payload))
    return header + MASK + mask(payload)


def deflate(payload: bytes, bits: int = 15) -> bytes:
    compressor = zlib.compressobj(wbits=-bits)
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return data.removesuffix(b"\x00\x00\xff\xff")


def read(data: bytes, *, step: int = 0, max_size: int = 1 << 20, compressed: bool = False) -> list:
    reader = FrameReader(max_size, compressed=compressed)
    events = []
    step = step or len(data) or 1
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        while (event := reader.next()) is not None:
            events.append(event)
    return events


def failure(data: bytes, **options) -> int:
    """The code with which `data` is refused, whole and byte by byte alike."""
    whole, chopped = read(data, **options)[-1], read(data, step=1, **options)[-1]
    assert whole == chopped
    assert whole[0] == FAIL
    return whole[1][0]


@pytest.fixture(params=[0, 1, 2, 7, 1000], ids=lambda step: f"step={step}")
def step(request):
    return request.param


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 128, 65535, 65536, 70000])
def test_messages_of_every_length_encoding(size):
    text, data = "ü" * (size // 2), os.urandom(size)
    frames = client_frame(TEXT, text.encode()) + client_frame(BINARY, data)
    assert read(frames) == [(TEXT, text), (BINARY, data)]
    assert read(frames, step=1021) == [(TEXT, text), (BINARY, data)]


def test_fragments_with_control_frames_between_them(step):
    frames = (
        client_frame(TEXT, b"a\xc3", fin=False)
        + client_frame(PING, b"1")
        + client_frame(CONTINUATION, b"", fin=False)
        + client_frame(PONG, b"2")
        + client_frame(CONTINUATION, b"\xbcb")
        + client_frame(BINARY, b"c")
    )
    assert read(frames, step=step) == [(PING, b"1"), (PONG, b"2"), (TEXT, "aüb"), (BINARY, b"c")]


def test_a_message_of_empty_fragments(step):
    frames = (
        client_frame(TEXT, fin=False)
        + client_frame(CONTINUATION, fin=False)
        + client_frame(CONTINUATION)
    )
    assert read(frames, step=step) == [(TEXT, "")]


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_a_reserved_opcode_is_a_protocol_error(opcode):
    assert failure(client_frame(opcode)) == 1002


@pytest.mark.parametrize("rsv", range(1, 8))
@pytest.mark.parametrize("opcode", [TEXT, BINARY, CLOSE, PING, PONG])
def test_a_reserved_bit_is_a_protocol_error(opcode, rsv):
    assert failure(client_frame(opcode, rsv=rsv)) == 1002


@pytest.mark.parametrize(("opcode", "rsv"), [(TEXT, 2), (BINARY, 5), (PING, 4), (CLOSE, 4)])
def test_with_compression_only_the_first_bit_of_data_is_not_reserved(opcode, rsv):
    assert failure(client_frame(opcode, rsv=rsv), compressed=True) == 1002


def test_a_continuation_is_not_marked_as_compressed():
    start = client_frame(TEXT, b"\xf2", fin=False, rsv=4)
    assert failure(start + client_frame(CONTINUATION, b"", rsv=4), compressed=True) == 1002


def test_a_frame_without_a_mask_is_a_protocol_error():
    assert failure(frame_header(TEXT, 1) + b"a") == 1002


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_a_control_frame_is_short_and_whole(opcode):
    assert failure(client_frame(opcode, b"x" * 126)) == 1002
    assert failure(client_frame(opcode, fin=False)) == 1002


@pytest.mark.parametrize("payload", [b"", b"a"])
def test_a_message_does_not_begin_within_another(payload):
    start = client_frame(TEXT, payload, fin=False)
    assert failure(start + client_frame(TEXT, b"b")) == 1002
    assert failure(start + client_frame(BINARY, b"b", fin=False)) == 1002


@pytest.mark.parametrize("fin", [True, False])
def test_nothing_cannot_be_continued(fin):
    assert failure(client_frame(CONTINUATION, b"a", fin=fin)) == 1002
    assert failure(client_frame(TEXT, b"a") + client_frame(CONTINUATION, b"a", fin=fin)) == 1002


@pytest.mark.parametrize(
    "length",
    [
        b"\xfe\x00\x7d",
        b"\xff\x00\x00\x00\x00\x00\x00\xff\xff",
        b"\xff\x80\x00\x00\x00\x00\x00\x00\x00",
    ],
)
def test_a_length_has_its_shortest_form(length):
    assert failure(b"\x82" + length, max_size=0) == 1002


@pytest.mark.parametrize(
    "text",
    [
        b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
        b"\xc0\xaf",
        b"\xf4\x90\x80\x80",
        b"\xff",
        b"abc\xc3",
    ],
)
def test_text_that_is_no_utf8_is_refused(text):
    assert failure(client_frame(TEXT, text)) == 1007
    halves = client_frame(TEXT, text[:1], fin=False) + client_frame(CONTINUATION, text[1:])
    assert failure(halves) == 1007


def test_invalid_utf8_is_refused_before_its_message_or_its_frame_is_complete():
    reader = FrameReader(0, compressed=False)
    reader.feed(client_frame(TEXT, b"ab", fin=False))
    assert reader.next() is None
    reader.feed(client_frame(CONTINUATION, b"\xff" + b"x" * 100)[:7])
    assert reader.next() == (FAIL, (1007, "invalid UTF-8"))


def test_what_precedes_the_fault_is_given_and_nothing_after_it(step):
    frames = client_frame(TEXT, b"a") + client_frame(3) + client_frame(TEXT, b"b")
    events = read(frames, step=step)
    assert events[0] == (TEXT, "a")
    assert [kind for kind, _ in events[1:]] == [FAIL]


# --- sizes


def test_a_message_of_the_largest_size_is_taken_and_no_larger_one():
    assert read(client_frame(BINARY, b"x" * 1000), max_size=1000) == [(BINARY, b"x" * 1000)]
    assert failure(client_frame(BINARY, b"x" * 1001), max_size=1000) == 1009


def test_fragments_count_together():
    start = client_frame(BINARY, b"x" * 600, fin=False)
    assert failure(start + client_frame(CONTINUATION, b"x" * 401), max_size=1000) == 1009
    assert len(read(start + client_frame(CONTINUATION, b"x" * 400), max_size=1000)[0][1]) == 1000


def test_a_message_that_is_too_large_is_refused_for_its_header_alone():
    reader = FrameReader(1000, compressed=False)
    reader.feed(client_frame(BINARY, b"x" * 5000)[:4])
    event = reader.next()
    assert event is not None
    assert event[1][0] == 1009


def test_a_message_inflates_to_no_more_than_the_largest_size():
    exact = client_frame(BINARY, deflate(b"x" * 1000), rsv=4)
    assert read(exact, max_size=1000, compressed=True) == [(BINARY, b"x" * 1000)]
    above = client_frame(TEXT, deflate(b"x" * 1001), rsv=4)
    assert failure(above, max_size=1000, compressed=True) == 1009


def test_a_bomb_is_refused_before_it_is_inflated():
    bomb = client_frame(BINARY, deflate(bytes(64 << 20)), rsv=4)
    tracemalloc.start()
    try:
        assert read(bomb, max_size=1 << 20, compressed=True)[-1][1][0] == 1009
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_what_compression_makes_longer_is_taken_up_to_the_largest_size(step):
    noise = os.urandom(1000)
    frame = client_frame(BINARY, deflate(noise), rsv=4)
    assert read(frame, step=step, max_size=1000, compressed=True) == [(BINARY, noise)]


def test_a_message_may_be_uncompressed_where_compression_was_agreed_upon():
    frames = client_frame(TEXT, b"a") + client_frame(TEXT, deflate(b"b"), rsv=4)
    assert read(frames, compressed=True) == [(TEXT, "a"), (TEXT, "b")]
    assert failure(client_frame(BINARY, b"x" * 1001), max_size=1000, compressed=True) == 1009


# --- compression


def test_a_compressed_message_in_fragments(step):
    data = deflate("grüße".encode() * 100)
    frames = (
        client_frame(TEXT, data[:5], fin=False, rsv=4)
        + client_frame(PING)
        + client_frame(CONTINUATION, data[5:9], fin=False)
        + client_frame(CONTINUATION, data[9:])
    )
    assert read(frames, step=step, compressed=True) == [(PING, b""), (TEXT, "grüße" * 100)]


def test_the_client_may_refer_to_earlier_messages():
    compressor = zlib.compressobj(wbits=-15)
    frames = b""
    for _ in range(3):
        data = compressor.compress(b"hello hello hello") + compressor.flush(zlib.Z_SYNC_FLUSH)
        frames += client_frame(TEXT, data.removesuffix(b"\x00\x00\xff\xff"), rsv=4)
    assert read(frames, compressed=True) == [(TEXT, "hello hello hello")] * 3


def test_the_client_may_end_its_stream_with_each_message():
    # RFC 7692, 7.2.3.4
    data = bytes.fromhex("f348cdc9c90700") + b"\x00"
    frames = client_frame(TEXT, data, rsv=4) * 2
    assert read(frames, compressed=True) == [(TEXT, "Hello")] * 2


def test_endless_ends_of_streams_are_refused():
    data = bytes.fromhex("0300") * 1000
    assert failure(client_frame(TEXT, data, rsv=4), compressed=True) == 1009


def test_data_that_cannot_be_inflated_is_refused():
    assert failure(client_frame(BINARY, b"\xff\xff\xff", rsv=4), compressed=True) == 1007


@pytest.mark.parametrize("takeover", [True, False])
@pytest.mark.parametrize("bits", [9, 10, 12, 15])
def test_what_is_compressed_can_be_inflated(bits, takeover):
    deflater = Deflater(bits, takeover=takeover)
    inflater = zlib.decompressobj(-bits)
    for size in (1, 100, 100_000):
        message = (b"abcdefgh" + os.urandom(8)) * size
        if not takeover:
            inflater = zlib.decompressobj(-bits)
        assert inflater.decompress(deflater.compress(message) + b"\x00\x00\xff\xff") == message


# --- closing


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1011, 1012, 1014, 3000, 4999])
def test_a_close_frame_with_code_and_reason(code, step):
    payload = struct.pack("!H", code) + "tschüß".encode()
    assert read(client_frame(CLOSE, payload), step=step) == [(CLOSE, (code, "tschüß"))]
    assert is_close_code(code)


@pytest.mark.parametrize(
    "code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]
)
def test_a_code_that_is_never_sent_is_a_protocol_error(code):
    assert failure(client_frame(CLOSE, struct.pack("!H", code))) == 1002
    assert not is_close_code(code)


def test_a_close_frame_without_a_code_is_1005():
    assert read(client_frame(CLOSE)) == [(CLOSE, (1005, ""))]


def test_a_close_frame_of_one_byte_is_a_protocol_error():
    assert failure(client_frame(CLOSE, b"\x03")) == 1002


def test_the_reason_of_a_close_frame_is_utf8():
    assert failure(client_frame(CLOSE, b"\x03\xe8\xff")) == 1007


def test_nothing_is_read_after_a_close_frame(step):
    frames = client_frame(CLOSE) + client_frame(TEXT, b"a") + client_frame(3)
    assert read(frames, step=step) == [(CLOSE, (1005, ""))]


def test_the_payload_of_a_close_frame():
    assert close_payload(1000, "bye") == b"\x03\xe8bye"
    assert close_payload(1005) == b""
    long = close_payload(4000, "ü" * 100)
    assert len(long) <= 125
    assert long[2:].decode() == "ü" * 61
    with pytest.raises(ValueError, match="1006"):
        close_payload(1006)


# --- before aiohttp's reader --------------------------------------------------------------


def read_with_aiohttp(data: bytes, step: int = 0) -> list:
    """What aiohttp's reader gives behind ours: messages, and at last the code of a fault."""

    async def collect():
        loop = asyncio.get_running_loop()
        queue = WebSocketDataQueue(BaseProtocol(loop), 1 << 20, loop=loop)
        reader = StrictReader(WebSocketReader(queue, 1 << 20, compress=True, decode_text=True))
        for start in range(0, len(data), step or len(data)):
            reader.feed_data(data[start : start + (step or len(data))])
        if queue.exception() is None:
            reader.feed_eof()
        found = []
        try:
            while True:
                message = await queue.read()
                found.append((int(message.type), message.data))
        except WebSocketError as error:
            found.append(error.code)
        except EofStream:
            pass
        return found

    return asyncio.run(collect())


def test_what_is_right_reaches_aiohttps_reader(step):
    data = b"".join(
        [
            client_frame(TEXT, b"one"),
            client_frame(TEXT, fin=False),
            client_frame(PING, b"p" * 125),
            client_frame(CONTINUATION, b"two" * 100, fin=False),
            client_frame(CONTINUATION, b""),
            client_frame(BINARY, b"x" * 70_000),
            client_frame(TEXT, deflate(b"three"), rsv=4),
            client_frame(PONG),
            client_frame(CLOSE, close_payload(3000, "bye")),
        ]
    )
    assert read_with_aiohttp(data, step) == [
        (TEXT, "one"),
        (PING, b"p" * 125),
        (TEXT, "two" * 100),
        (BINARY, b"x" * 70_000),
        (TEXT, "three"),
        (PONG, b""),
        (CLOSE, 3000),
    ]


@pytest.mark.parametrize(
    "frames",
    [
        b"\x81\x02hi",
        b"\x89\x00",
        client_frame(PING, deflate(b"ping"), rsv=4),
        client_frame(TEXT, fin=False) + client_frame(TEXT, b"another"),
        client_frame(TEXT, fin=False) + client_frame(BINARY, b"another", fin=False),
        b"\x82\xfe\x00\x7d" + MASK + bytes(125),
        b"\x82\xff\x00\x00\x00\x00\x00\x00\xff\xff" + MASK + bytes(65535),
        *(
            client_frame(CLOSE, struct.pack("!H", code))
            for code in (0, 999, 1004, 1005, 1006, 1015)
        ),
    ],
    ids=lambda frames: frames[:12].hex(),
)
def test_what_aiohttps_reader_would_let_pass_is_a_protocol_error(frames, step):
    before = client_frame(TEXT, b"before")
    data = before + frames + client_frame(TEXT, b"after")
    assert read_with_aiohttp(data, step) == [(TEXT, "before"), 1002]


def test_the_faults_that_aiohttps_reader_sees_are_left_to_it(step):
    data = client_frame(CLOSE, b"x") + client_frame(TEXT, b"after")
    assert read_with_aiohttp(data, step) == [1002]
    assert read_with_aiohttp(client_frame(TEXT, b"\xff"), step) == [1007]
    assert read_with_aiohttp(client_frame(PING, b"x" * 126), step) == [1002]
