"""The shard format: what is written is read, and nothing damaged is read."""

from __future__ import annotations

import errno
import itertools
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from grist_data import Tokenizer
from grist_data.atomic import atomic_file, read_json
from grist_data.shard_header import BLOCK_BYTES, HEADER_BYTES, Encoding
from grist_data.shard_writer import token_bytes_for, write_shard
from grist_data.shards import ShardFile, Shards

ENCODING = Encoding(2, 60_000, 0, None, True, "ab" * 32, "cd" * 32)


def written(path, tokens, lengths, encoding=ENCODING, **facts):
    ends = np.cumsum(lengths) if len(lengths) else np.zeros(0, np.int64)
    hashes = b"".join(xxhash.xxh3_128_digest(b"%d" % k) for k in range(len(lengths)))
    write_shard(path, encoding, tokens, ends, hashes, {"split": "train"}, **facts)
    return ShardFile(path, "full")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=20), st.sampled_from([2, 4]), st.integers(0, 5))
def test_what_is_written_is_read(tmp_path_factory, lengths, token_bytes, cut):
    path = tmp_path_factory.mktemp("shard") / "a.tok"
    tokens = np.random.default_rng(len(lengths)).integers(0, 60_000, sum(lengths))
    pieces = [tokens[:cut], tokens[cut:cut], tokens[cut:]]
    shard = written(path, pieces, lengths, replace(ENCODING, token_bytes=token_bytes), shard=3, n_shards=7)
    assert shard.tokens(0, len(tokens)).tolist() == tokens.tolist()
    assert shard.tokens(0, 1).dtype.itemsize == token_bytes
    assert shard.doc_ends.tolist() == np.cumsum(lengths).tolist()
    assert shard.doc_hashes.shape == (len(lengths), 16)
    assert shard.metadata == {"split": "train"}
    assert (shard.header.shard, shard.header.n_shards, shard.header.n_docs) == (3, 7, len(lengths))
    assert list(shard.problems()) == []
    assert not list(path.parent.glob("*.part"))


def test_layout_is_the_published_one(tmp_path):
    """Read with offsets from data/README.md alone, not with our own code."""
    path = tmp_path / "a.tok"
    encoding = replace(ENCODING, eot_id=5, bos_id=None)
    tokens = np.arange(BLOCK_BYTES // 2 + 100) % 60_000  # two blocks
    written(path, [tokens], [len(tokens) - 7, 7], encoding, shard=1, n_shards=2)
    data = path.read_bytes()
    assert data[:8] == b"\x89TOK\r\n\x1a\n"
    assert struct.unpack_from("<HHI", data, 8) == (1, 0, 4096)
    assert struct.unpack_from("<QQ", data, 16) == (len(tokens), 2)
    assert struct.unpack_from("<BBHIII", data, 32) == (2, 1 | 8, 0, 60_000, 5, 2**32 - 1)
    sections = [struct.unpack_from("<QQ", data, 48 + 16 * k) for k in range(6)]
    assert [offset % 4096 for offset, _ in sections] == [0] * 6
    assert [size for _, size in sections] == [2 * len(tokens), 16, 32, 0, 8 * (2 + 1 + 1 + 0 + 1), sections[5][1]]
    assert data[144:176].hex() == "ab" * 32
    assert data[176:208].hex() == "cd" * 32
    assert struct.unpack_from("<II", data, 208) == (1, 2)
    (header_sum,) = struct.unpack_from("<Q", data, 4088)
    assert header_sum == xxhash.xxh3_64_intdigest(data[:4088])
    content = [data[offset : offset + size] for offset, size in sections]
    assert np.frombuffer(content[0], "<u2").tolist() == tokens.tolist()
    assert np.frombuffer(content[1], "<u8").tolist() == [len(tokens) - 7, len(tokens)]
    assert json.loads(content[5]) == {"split": "train"}
    blocks = [[c[i : i + 2**20] for i in range(0, len(c), 2**20)] for k, c in enumerate(content) if k != 4]
    sums = [struct.pack(f"<{len(of)}Q", *map(xxhash.xxh3_64_intdigest, of)) for of in blocks]
    assert content[4] == b"".join(sums)
    of_sections = struct.pack("<5Q", *map(xxhash.xxh3_64_intdigest, sums))
    assert struct.unpack_from("<Q", data, 216) == (xxhash.xxh3_64_intdigest(content[4] + of_sections),)


def test_block_sums_do_not_depend_on_the_pieces(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 3 * BLOCK_BYTES // 2 + 11)
    cuts = [0, 1, 700_000, 700_001, len(tokens)]
    pieces = [tokens[a:b] for a, b in itertools.pairwise(cuts)]
    a = written(tmp_path / "a.tok", [tokens], [len(tokens)])
    b = written(tmp_path / "b.tok", pieces, [len(tokens)])
    assert a.header.root == b.header.root
    assert (tmp_path / "a.tok").read_bytes() == (tmp_path / "b.tok").read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "asked", "expected"),
    [(65_536, "auto", 2), (65_537, "auto", 4), (100, "uint32", 4), (65_536, "uint16", 2)],
)
def test_token_width(vocab_size, asked, expected):
    assert token_bytes_for(vocab_size, asked) == expected


def test_vocabulary_too_large_for_uint16():
    with pytest.raises(ValueError, match="vocabulary too large for uint16: 65,537 ids, but 16 bits hold 65,536"):
        token_bytes_for(65_537, "uint16")
    with pytest.raises(ValueError, match="token_dtype must be"):
        token_bytes_for(10, "int8")


def test_ids_outside_the_vocabulary_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="token id 60000 is outside the vocabulary of 60000 ids"):
        written(tmp_path / "a.tok", [np.array([1, 60_000])], [2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lengths", [[1], [1, 2], [2, 0], []])
def test_ends_that_do_not_fit_are_not_written(tmp_path, lengths):
    with pytest.raises(ValueError, match="document ends must rise"):
        written(tmp_path / "a.tok", [np.array([1, 2])], lengths)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            if self._file.tell() > 8000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._file.close()

    real_open = open
    monkeypatch.setattr(
        "builtins.open",
        lambda path, mode="r", *a, **k: Full(real_open(path, mode)) if "w" in mode else real_open(path, mode),
    )
    with pytest.raises(OSError, match=r"no space left while writing .*a.tok; free some and run the same command again"):
        written(tmp_path / "a.tok", [np.arange(5000)], [5000])
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_nothing_behind(tmp_path):
    def interrupted():
        with atomic_file(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


# Damage. `own_dataset` is a copy of a dataset of several shards.


def train_shard(dataset, index=0):
    return sorted(dataset.glob("train-*.tok"))[index]


def change_byte(path, at, by=1):
    data = bytearray(path.read_bytes())
    data[at] = (data[at] + by) % 256
    path.write_bytes(data)


@pytest.mark.parametrize("keep", [0, 7, 100, HEADER_BYTES - 1, HEADER_BYTES, -4096, -1])
def test_truncated_shard(own_dataset, keep):
    path = train_shard(own_dataset)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"truncated|not a token shard") as error:
        Shards.open(own_dataset)
    assert path.name in str(error.value)


def test_too_long_shard(own_dataset):
    path = train_shard(own_dataset)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="too long"):
        Shards.open(own_dataset)


def test_wrong_magic(own_dataset):
    path = train_shard(own_dataset)
    path.write_bytes(b"\x93NUMPY" + path.read_bytes()[6:])
    with pytest.raises(ValueError, match=r"is not a token shard: it begins with b'.x93NUMPY"):
        Shards.open(own_dataset)


def test_unknown_version(own_dataset):
    change_byte(train_shard(own_dataset), 8)
    with pytest.raises(ValueError, match=r"format version 2.0, but this program reads version 1"):
        Shards.open(own_dataset)


@pytest.mark.parametrize("at", [16, 40, 60, 150, 216, 3000, 4090])
def test_damaged_header(own_dataset, at):
    change_byte(train_shard(own_dataset), at)
    with pytest.raises(ValueError, match="header does not match its checksum"):
        Shards.open(own_dataset)


def test_flipped_token_is_found_lazily_and_fully_but_not_by_header(own_dataset):
    path = train_shard(own_dataset)
    change_byte(path, HEADER_BYTES + 10)
    assert Shards.open(own_dataset).n_tokens > 0
    message = rf"{path.name}: block 0 of section tokens \(bytes 4096 to \d+\) does not match its checksum"
    with pytest.raises(ValueError, match=message):
        Shards.open(own_dataset, verify="full")
    lazy = Shards.open(own_dataset, verify="lazy")
    second = ShardFile(train_shard(own_dataset, 1)).header.n_tokens
    assert len(lazy.read(lazy.n_tokens - second, 5)) == 5  # another shard is fine
    with pytest.raises(ValueError, match=message):
        lazy.read(0, 5)
    with pytest.raises(ValueError, match=message):
        lazy.gather(np.array([3]), np.zeros((1, 4), lazy.dtype))


def test_flipped_document_end_is_found_lazily(own_dataset):
    path = train_shard(own_dataset)
    change_byte(path, ShardFile(path).header.sections["doc_ends"][0])
    with pytest.raises(ValueError, match="section doc_ends"):
        Shards.open(own_dataset, verify="lazy")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_byte_is_found_lazily_and_fully(tmp_path_factory, data):
    """Both name the file, the section and where in the file; `lazy` when the byte's block is first read, or at once."""
    path = tmp_path_factory.mktemp("shard") / "a.tok"
    shard = written(path, [np.arange(3000)], [1000, 1500, 500])
    sections = {name: span for name, span in shard.header.sections.items() if span[1]}
    part = data.draw(st.sampled_from(["header", "between", *sections]))
    if part == "header":
        at = data.draw(st.integers(0, HEADER_BYTES - 1))
        message = r"a.tok: .*header does not match its checksum|a.tok is not a token shard|a.tok has format version"
    elif part == "between":
        used = {byte for begin, size in sections.values() for byte in (*range(begin, begin + size),)}
        free = [byte for byte in range(HEADER_BYTES, path.stat().st_size) if byte not in used]
        at = data.draw(st.sampled_from(free))
        message = rf"a.tok: the padding after section \w+ is not zero at byte {at}$"
    else:
        begin, size = sections[part]
        at = begin + data.draw(st.integers(0, size - 1))
        message = rf"a.tok: (block 0 of )?section {part} \(bytes {begin} to {begin + size - 1}\) does not match"
    change_byte(path, at, data.draw(st.integers(1, 255)))
    with pytest.raises(ValueError, match=message):
        ShardFile(path, "full")
    with pytest.raises(ValueError, match=message):
        read_everything(ShardFile(path, "lazy"))


def read_everything(shard: ShardFile) -> None:
    shard.tokens(0, shard.header.n_tokens)
    assert shard.doc_ends.size
    assert shard.doc_hashes.size
    assert shard.metadata


def test_shard_of_another_dataset(own_dataset):
    first, second = train_shard(own_dataset, 0), train_shard(own_dataset, 1)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"is not the shard that dataset.json lists"):
        Shards.open(own_dataset)


def test_missing_shard(own_dataset):
    train_shard(own_dataset, 1).unlink()
    with pytest.raises(FileNotFoundError, match=r"no token shard at .*train-00001"):
        Shards.open(own_dataset)


def test_tokenizer_mismatch(own_dataset, dataset):
    with pytest.raises(ValueError, match=r"made with another tokenizer: it has sha256 \w{64}, but ffff was expected"):
        Shards.open(dataset, tokenizer_sha256="ffff")
    assert Shards.open(dataset, tokenizer_sha256=Tokenizer.load(dataset).sha256).n_docs > 0
    (own_dataset / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer that this dataset was made with"):
        Shards.open(own_dataset)


def test_shard_with_another_tokenizer(own_dataset):
    path = train_shard(own_dataset)
    shard = ShardFile(path)
    encoding = replace(shard.header.encoding, tokenizer_sha256="12" * 32)
    tokens = shard.tokens(0, shard.header.n_tokens).copy()
    write_shard(path, encoding, [tokens], shard.doc_ends.copy(), shard.doc_hashes.tobytes(), shard.metadata)
    with pytest.raises(ValueError, match="made with another tokenizer than its dataset: 1212"):
        Shards.open(own_dataset)


def test_missing_and_unfinished_datasets(own_dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset in .*: prepare one with python -m grist_data.prepare"):
        Shards.open(tmp_path / "nowhere")
    (own_dataset / "dataset.json").unlink()
    with pytest.raises(ValueError, match="is not finished: run the command that prepares it again"):
        Shards.open(own_dataset)


def test_edited_dataset_json(own_dataset):
    file = own_dataset / "dataset.json"
    file.write_text(file.read_text().replace('"documents"', '"Documents"', 1))
    with pytest.raises(ValueError, match="does not match its checksum"):
        Shards.open(own_dataset)
    file.write_text("{}")
    with pytest.raises(ValueError, match="expected format 'gristmill-tokens'"):
        Shards.open(own_dataset)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(file)


def test_unknown_split_and_verify(dataset):
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        Shards.open(dataset, "test")
    with pytest.raises(ValueError, match="verify must be one of header, lazy, full"):
        Shards.open(dataset, verify="some")  # type: ignore[arg-type]


def test_reading_across_shards(dataset):
    shards = Shards.open(dataset, verify="lazy")
    assert len(shards.shards) > 2
    whole = np.concatenate([s.tokens(0, s.header.n_tokens) for s in shards.shards])
    assert len(whole) == shards.n_tokens
    border = shards.shards[0].header.n_tokens
    for offset, n in [(0, shards.n_tokens), (border - 3, 7), (border, 2), (shards.n_tokens, 0), (5, 0)]:
        assert shards.read(offset, n).tolist() == whole[offset : offset + n].tolist()
    for offset, n in [(-1, 2), (shards.n_tokens - 1, 2), (0, -1)]:
        with pytest.raises(IndexError, match="outside the split"):
            shards.read(offset, n)


def test_document_ends_across_shards(dataset):
    shards = Shards.open(dataset)
    all_ends, begin = [], 0
    for shard in shards.shards:
        all_ends += (shard.doc_ends + begin).tolist()
        begin += shard.header.n_tokens
    for offset in range(0, shards.n_tokens - 500, 97):
        expected = [end - offset for end in all_ends if offset < end < offset + 500]
        assert shards.document_ends(offset, 500).tolist() == expected


def test_every_document_ends_with_end_of_text_and_its_text_is_back(dataset, corpus):
    tokenizer = Tokenizer.load(dataset)
    texts = {json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()}
    found: list[str] = []
    for split in ("train", "val"):
        shards = Shards.open(dataset, split)
        before = len(found)
        for shard in shards.shards:
            for begin, end in zip([0, *shard.doc_ends[:-1]], shard.doc_ends, strict=True):
                ids = shard.tokens(int(begin), int(end)).tolist()
                assert ids[-1] == tokenizer.eot_id
                assert tokenizer.eot_id not in ids[:-1]
                found.append(tokenizer.decode(ids[:-1]))
        assert shards.n_docs == len(found) - before
        assert shards.n_bytes == sum(len(text.encode()) for text in found[before:])
    assert len(found) == len(texts)
    assert set(found) == texts
