"""Project Gutenberg: markers of every wording, and downloads from a server that breaks off."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from grist_data import PrepareConfig, Shards, prepare
from grist_data.sources import gutenberg

BODY = "CHAPTER I\n\nThe mill stood by the river; START and END mean nothing here.\n*** stars ***\n\nIt turned."
HEADERS = [
    "*** START OF THE PROJECT GUTENBERG EBOOK THE MILL ***\n",
    "*** START OF THIS PROJECT GUTENBERG EBOOK THE MILL ***\n",
    "***START OF THE PROJECT GUTENBERG EBOOK THE MILL***\n",
    "*** START OF THE PROJECT GUTENBERG EBOOK THE COMPLETE\nWORKS OF THE MILLER ***\n",
    "*** start of the project gutenberg etext the mill ***\n",
    "*** START OF THE PROJECT GUTENBERG EBOOK 84 ***\n",
    "***START OF THE PROJECT GUTENBERG EBOOK THE MILL\n",
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n",
    "*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n",
    "*** START OF THE PROJECT GUTENBERG EBOOK THE MILL ***\nold notice\n*END*THE SMALL PRINT! FOR ETEXTS*Ver.04*END*\n",
]
FOOTERS = [
    "*** END OF THE PROJECT GUTENBERG EBOOK THE MILL ***\nlicence",
    "*** END OF THIS PROJECT GUTENBERG EBOOK THE MILL ***\n*** START: FULL LICENSE ***",
    "***END OF THE PROJECT GUTENBERG EBOOK THE MILL***",
    "End of the Project Gutenberg EBook of The Mill, by Miller\n\n*** END OF THIS PROJECT GUTENBERG EBOOK THE MILL ***",
    "End of Project Gutenberg's The Mill, by Miller\n",
    "End of Project Gutenberg’s The Mill",
    "End of The Project Gutenberg Etext of The Mill",
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("footer", FOOTERS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_wording(header, footer, newline):
    text = f"\ufeffThe Project Gutenberg EBook of The Mill\n\nTitle: The Mill\n\n{header}\n\n{BODY}\n\n\n{footer}\n"
    assert gutenberg.strip_boilerplate(text.replace("\n", newline), "mill") == BODY + "\n"


def test_missing_markers_are_an_error_or_kept():
    start, end = HEADERS[0], FOOTERS[0]
    with pytest.raises(ValueError, match=r"mill.txt has no START marker .*missing_markers=keep"):
        gutenberg.strip_boilerplate(BODY + "\n" + end, "mill.txt")
    with pytest.raises(ValueError, match=r"mill.txt has no END marker"):
        gutenberg.strip_boilerplate(start + BODY, "mill.txt")
    for text in (BODY, start + BODY, BODY + "\n" + end):
        assert gutenberg.strip_boilerplate(text, "mill.txt", keep_unmarked=True) == BODY + "\n"


def book(number: int) -> bytes:
    lines = "".join(f"Line {k} of book {number}: naïve grain.\n" for k in range(4000))
    return f"{HEADERS[0]}{lines}{FOOTERS[0]}".encode()


@dataclass
class Server:
    """What the test server does; `requests` is what it was asked for."""

    ranges: bool = True
    drops: int = 0  # so many answers break off in the middle
    refusals: list[int] = field(default_factory=list)  # status codes of the first answers
    etag: str = '"one"'
    content: bytes = b""
    requests: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, server: Server, *args) -> None:
        self.plan = server
        super().__init__(*args)

    def log_message(self, format: str, *args) -> None:
        pass

    def do_GET(self) -> None:
        plan, wanted = self.plan, self.headers.get("Range")
        plan.requests.append(wanted)
        if plan.refusals:
            self.send_error(plan.refusals.pop(0))
            return
        number = int(self.path.strip("/").removesuffix(".txt"))
        content = plan.content or book(number)
        begin = 0
        if plan.ranges and wanted and self.headers.get("If-Range") == plan.etag:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("ETag", plan.etag)
        self.end_headers()
        if plan.drops:
            plan.drops -= 1
            self.wfile.write(content[begin : begin + (len(content) - begin) // 2])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(content[begin:])


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(gutenberg, "_pause_s", lambda attempt: 0.0)
    plan = Server()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, plan)) as running:
        running.handle_error = lambda *args: None  # type: ignore[method-assign]
        plan.url = f"http://127.0.0.1:{running.server_port}/{{book}}.txt"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield plan
        running.shutdown()
        thread.join()


def fetch(server: Server, directory, books=(84,)):
    return list(gutenberg.documents(books=books, cache_dir=str(directory), url=server.url))


def test_a_download_is_cached_and_complete(server, tmp_path):
    first = fetch(server, tmp_path, (84, 41))
    assert [document.id for document in first] == ["gutenberg/84", "gutenberg/41"]
    assert first[0].text.startswith("Line 0 of book 84: naïve grain.\n")
    assert first[0].text.count("\n") == 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pg41.txt", "pg84.txt"]
    assert fetch(server, tmp_path, (84, 41)) == first
    assert len(server.requests) == 2


def test_a_broken_download_goes_on_where_it_broke(server, tmp_path):
    server.drops = 3
    (document,) = fetch(server, tmp_path)
    assert (tmp_path / "pg84.txt").read_bytes() == book(84)
    half, rest = len(book(84)) // 2, server.requests[1]
    assert rest == f"bytes={half}-"
    begins = [int(str(wanted)[6:-1]) for wanted in server.requests[1:]]
    assert begins == sorted(set(begins))
    assert document.text.count("\n") == 4000


def test_a_server_without_ranges(server, tmp_path):
    server.drops, server.ranges = 2, False
    fetch(server, tmp_path)
    assert (tmp_path / "pg84.txt").read_bytes() == book(84)


def test_a_file_that_changed_meanwhile_is_read_anew(server, tmp_path):
    server.drops, server.content = 1, book(84)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gutenberg, "_ATTEMPTS", 1)
        with pytest.raises(OSError, match="could not be downloaded in 1 attempts"):
            fetch(server, tmp_path)
    assert (tmp_path / "pg84.txt.part").stat().st_size > 0
    server.content, server.etag = book(84).replace(b"grain", b"flour"), '"two"'
    fetch(server, tmp_path)
    assert (tmp_path / "pg84.txt").read_bytes() == server.content


def test_a_later_call_goes_on(server, tmp_path):
    server.drops = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gutenberg, "_ATTEMPTS", 1)
        with pytest.raises(OSError, match="the connection ended after"):
            fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert server.requests[1] is not None
    assert (tmp_path / "pg84.txt").read_bytes() == book(84)


def test_a_busy_server_is_asked_again_and_an_absent_book_is_not(server, tmp_path):
    server.refusals = [503, 429, 500]
    fetch(server, tmp_path)
    assert len(server.requests) == 4
    server.refusals = [404]
    with pytest.raises(OSError, match=r"/41.txt cannot be downloaded: the server says 404"):
        fetch(server, tmp_path, (41,))
    assert len(server.requests) == 5


def test_a_server_that_never_finishes(server, tmp_path):
    server.drops = 100
    with pytest.raises(OSError, match=r"could not be downloaded in 6 attempts; the last failed with: "):
        fetch(server, tmp_path)
    assert not (tmp_path / "pg84.txt").exists()


def test_a_page_that_is_no_book(server, tmp_path):
    server.content = b"<html>Too many requests</html>"
    with pytest.raises(ValueError, match=r"pg84.txt has no START marker of Project Gutenberg: is it a whole book"):
        fetch(server, tmp_path)


@pytest.mark.parametrize("name", ["pg84.txt", "84.txt", "84-0.txt"])
def test_a_file_on_disk_is_used_as_it_is(server, tmp_path, name):
    (tmp_path / name).write_bytes(HEADERS[1].encode() + b"My own copy.\n" + FOOTERS[2].encode())
    (document,) = fetch(server, tmp_path)
    assert document.text == "My own copy.\n"
    assert server.requests == []


def test_old_encodings(server, tmp_path):
    old = f"Character set encoding: ISO-8859-1\n{HEADERS[0]}naïve\n{FOOTERS[0]}".encode("latin-1")
    (tmp_path / "pg84.txt").write_bytes(old)
    assert fetch(server, tmp_path)[0].text == "naïve\n"
    (tmp_path / "pg84.txt").write_bytes(old.replace(b"ISO-8859-1", b"UTF-8"))
    with pytest.raises(ValueError, match=r"is not UTF-8 .* and declares no other encoding"):
        fetch(server, tmp_path)
    (tmp_path / "pg84.txt").write_bytes(old.replace(b"ISO-8859-1", b"martian"))
    with pytest.raises(ValueError, match="cannot be decoded as martian"):
        fetch(server, tmp_path)


def test_books_are_prepared(server, tmp_path):
    server.drops = 2
    config = PrepareConfig(
        source="gutenberg",
        books=(84, 41, 2009),
        url=server.url,
        cache_dir=str(tmp_path / "books"),
        vocab_size=300,
        out=str(tmp_path / "d"),
    )
    made = prepare(config)
    assert sum(Shards.open(made, split).n_docs for split in ("train", "val")) == 3
    assert len(gutenberg.BOOKS) == 11


def test_bad_option():
    with pytest.raises(ValueError, match="missing_markers must be 'error' or 'keep'"):
        list(gutenberg.documents(missing_markers="ignore"))
