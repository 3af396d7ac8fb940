"""HTTP/1.1 that is wrong, odd or meant to be read differently by two servers, as bytes, with the replies to expect."""

from __future__ import annotations

BODY = b'{"input":"x","max_tokens":1}'
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HIDDEN = b"DELETE /v1/tasks/sentiment HTTP/1.1\r\nHost: x\r\n\r\n"  # must never be taken for a request


def post(headers: bytes, body: bytes = BODY, version: bytes = b"1.1", extra: bytes = b"Connection: close\r\n") -> bytes:
    head = b"POST /v1/generate HTTP/%s\r\nHost: x\r\nContent-Type: application/json\r\n" % version
    return head + extra + headers + b"\r\n" + body


def get(
    target: bytes = b"/livez", headers: bytes = b"", host: bytes = b"x", version: bytes = b"1.1", method: bytes = b"GET"
) -> bytes:
    return b"%s %s HTTP/%s\r\nHost: %s\r\n%sConnection: close\r\n\r\n" % (method, target, version, host, headers)


def chunked(body: bytes) -> bytes:
    return post(CHUNKED, body)


KEPT = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"

Exchanges = dict[str, tuple[bytes, list[int]]]

LENGTHS: Exchanges = {
    "length": (post(LENGTH), [200]),
    "chunks": (post(CHUNKED, CHUNKS), [200]),
    "both": (post(LENGTH + CHUNKED, CHUNKS), [400]),
    "both, the other way round": (post(CHUNKED + LENGTH, CHUNKS), [400]),
    "both, a length of 0": (post(CHUNKED + b"Content-Length: 0\r\n", b"0\r\n\r\n" + HIDDEN), [400]),
    "both, kept alive": (post(b"Content-Length: 5\r\n" + CHUNKED, b"0\r\n\r\n" + HIDDEN, extra=b""), [400]),
    "two lengths, the same": (post(LENGTH + LENGTH), [200]),
    "two lengths": (post(LENGTH + b"Content-Length: 5\r\n"), [400]),
    "a list of lengths": (post(b"Content-Length: 28, 5\r\n"), [400]),
    "length below the body": (post(b"Content-Length: 4\r\n", BODY[:4] + HIDDEN, extra=b"Connection: close\r\n"), [400]),
    **{
        f"length {value!r}": (post(b"Content-Length: %s\r\n" % value), [400])
        for value in (
            b"-1",
            b"+28",
            b"0x1c",
            b"28.0",
            b"",
            b"2_8",
            b"28 5",
            b"1" + b"0" * 30,
            b"1" * 5000,
            b"\xd9\xa2\xd9\xa8",
        )
    },
    "a space before the colon": (post(b"Content-Length : 28\r\n"), [400]),
    "a space before the other colon": (post(b"Transfer-Encoding : chunked\r\n", CHUNKS), [400]),
    **{
        f"transfer encoding {value!r}": (post(b"Transfer-Encoding: %s\r\n" % value, CHUNKS), [400])
        for value in (
            b"identity",
            b"gzip, chunked",
            b"chunked, chunked",
            b"xchunked",
            b"\x0bchunked",
            b"",
            b"chunked;q=1",
            b'"chunked"',
        )
    },
    "two transfer encodings": (post(CHUNKED + b"Transfer-Encoding: identity\r\n", CHUNKS), [400]),
    "chunks in HTTP/1.0": (post(CHUNKED, CHUNKS, version=b"1.0"), [400]),
    **{
        f"chunk {size!r}": (chunked(size + b"\r\n" + BODY + b"\r\n0\r\n\r\n"), [400])
        for size in (b"-1", b"f" * 30, b"0x1c", b"zz", b"+1c", b"1c\x00", b"", b" 1c")
    },
    "a chunk longer than it says": (chunked(b"1c\r\n%sXX0\r\n\r\n" % BODY), [400]),
    "tiny chunks": (chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"), [200]),
    "too many tiny chunks": (chunked(b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n"), [400]),
    "a chunk extension": (chunked(b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)), [200]),
    "a flood of chunk extensions": (chunked((b"1;%s\r\n \r\n" % (b"a" * 300)) * 4_000), [400]),
    "an endless chunk extension": (chunked(b"1;" + b"a" * 2_000_000), [431]),
    "trailers": (chunked(b"1c\r\n%s\r\n0\r\nContent-Length: 5\r\nX: y\r\n\r\n" % BODY), [200]),
    "a flood of trailers": (chunked(b"1c\r\n%s\r\n0\r\n" % BODY + b"X: y\r\n" * 100_000), [431]),
}
HEADS: Exchanges = {
    "a folded line": (get(headers=b"X: a\r\n b\r\n"), [200]),
    "a folded first line": (b"GET /livez HTTP/1.1\r\n Host: x\r\nConnection: close\r\n\r\n", [400]),
    "bare line feeds": (b"GET /livez HTTP/1.1\nHost: x\nConnection: close\n\n", [200]),
    **{
        f"header {line!r}": (get(headers=line + b"\r\n"), [400])
        for line in (
            b"X: a\rb",
            b"X: a\x00b",
            b"X\x00: a",
            b"X y: a",
            b": a",
            b"abc",
            b"X\xff: a",
            b"X(: a",
            b"\tX: a\r\nBAD",
        )
    },
    "bytes above 127": (get(headers=b"X: \xff\xfe\r\n"), [200]),
    "many headers": (get(headers=b"A: b\r\n" * 98), [200]),
    "one too many": (get(headers=b"A: b\r\n" * 99), [431]),
    "20000 headers": (get(headers=b"A: b\r\n" * 20_000), [431]),
    "a large header": (get(headers=b"A: %s\r\n" % (b"b" * 63_000)), [200]),
    "too large a header, at once": (get(headers=b"A: %s\r\n" % (b"b" * 66_000)), [431]),
    "a header of 30 MB": (get(headers=b"A: %s\r\n" % (b"b" * 30_000_000)), [431]),
    "a reply to HEAD has no body": (get(headers=b"A: b\r\n" * 99, method=b"HEAD"), [431]),
    "no host": (b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n", [400]),
    "two hosts": (get(headers=b"Host: y\r\n"), [400]),
    **{f"host {host!r}": (get(host=host), [200]) for host in (b"", b"[::1]:8000", b"a.b:99999999", b"m%C3%BC")},
    **{
        f"host {host[:20]!r}": (get(host=host), [400])
        for host in (b"x/health?", b"a b", b"<script>", b"u@x", b"x#y", b"a" * 301, b'"', b"\xff", b"a\\b")
    },
    "HTTP/1.0": (get(version=b"1.0"), [200]),
    **{
        f"HTTP/{version!r}": (get(version=version), [400])
        for version in (b"2.0", b"9.9", b"0.9", b"1.10", b"1", b"x.1")
    },
    "HTTP/0.9": (b"GET /livez\r\n\r\n", [400]),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n", [400]),
    "an upgrade": (get(headers=b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"), [200]),
    "an override": (get(headers=b"X-HTTP-Method-Override: DELETE\r\nX-Original-URL: /v1/tasks/sentiment\r\n"), [200]),
    "a method in lower case": (get(method=b"get"), [405]),
    "a long method": (get(method=b"A" * 1000), [405]),
    "no method": (get(method=b"G@T{}"), [400]),
    "an unknown expectation": (post(LENGTH + b"Expect: the-unexpected\r\n"), [200]),
    "waits for 100": (post(LENGTH + b"Expect: 100-continue\r\n"), [200]),
    "compressed": (post(LENGTH + b"Content-Encoding: gzip\r\n"), [415]),
    "compressed twice": (post(LENGTH + b"Content-Encoding: gzip, br\r\n"), [415]),
    "no type": (b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n%s" % (LENGTH, BODY), [415]),
    "a web page's form": (post(LENGTH).replace(b"application/json", b"text/plain"), [415]),
}
TARGETS: Exchanges = {
    **{
        f"target {target[:20]!r}": (get(target), [404])
        for target in (
            *(
                b"http://evil/livez",
                b"//livez",
                b"//evil.com/v1/tasks",
                b"/%2e%2e/livez",
                b"/../livez",
                b"/v1/../livez",
            ),
            *(
                b"/%00",
                b"/%zz",
                b"/livez#x",
                b"livez",
                b"/livez%3f",
                b"/livez/",
                b"/livez;x",
                b"/LIVEZ",
                b"*",
                b"/livez%0d%0aX:y",
            ),
            *(b"/v1/tasks/%ff%fe", b"/v1/tasks/..%2f..%2fetc%2fpasswd", b"/" + b"a" * 60_000),
        )
    },
    **{f"target {target!r}": (get(target), [400]) for target in (b"/\xff", b"/a b", b"/a\tb", b"", b"/\x00", b"/\x7f")},
    "a long target": (get(b"/" + b"a" * 70_000), [431]),
    "a slash as an escape": (get(b"/v1%2ftasks"), [200]),
    "a query": (get(b"/livez?" + b"a=b&" * 10_000), [200]),
    "CONNECT": (get(b"evil:80", method=b"CONNECT"), [404]),
    "TRACE": (get(method=b"TRACE"), [405]),
    "OPTIONS *": (get(b"*", method=b"OPTIONS"), [404]),
}
PIPELINES: Exchanges = {
    "three": (KEPT * 3 + get(), [200] * 4),
    "behind a POST": (post(LENGTH, extra=b"") + get(), [200, 200]),
    "behind chunks": (post(CHUNKED, CHUNKS, extra=b"") + get(), [200, 200]),
    "behind a GET with a body": (
        b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde" + get(),
        [200, 200],
    ),
    "behind a refusal": (post(LENGTH, b"x" * len(BODY), extra=b"") + get(), [400, 200]),
    "behind a 404 with a body": (post(LENGTH, extra=b"").replace(b"generate", b"nothing1") + get(), [404, 200]),
    "behind the close": (get() + HIDDEN, [200]),
    "then nonsense": (KEPT + b"BAD\r\n\r\n" + HIDDEN, [200, 400]),
    "nonsense first": (b"BAD\r\n\r\n" + HIDDEN, [400]),
    "an ambiguous one second": (KEPT + post(LENGTH + CHUNKED, CHUNKS, extra=b"") + HIDDEN, [200, 400]),
    "many": (KEPT * 300 + get(), [200] * 301),
}
EXCHANGES: Exchanges = {
    f"{group}: {name}": exchange
    for group, exchanges in {"length": LENGTHS, "head": HEADS, "target": TARGETS, "pipeline": PIPELINES}.items()
    for name, exchange in exchanges.items()
}
