"""What is in a packed table, by what the table says of itself: sizes are read, and nothing is unpacked.

parquet   a column's part of a row group:  dictionary page | page | page ...
                                           header: bytes unpacked, bytes in the file, encoding

Arrow     schema | dictionary | batch | batch ...   and in Feather's form a footer that says where each one stands
          head: where its buffers are | buffers: each begins with the size that it unpacks to
"""

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

FEATHER = b"ARROW1"
"""First and last bytes of Arrow's form with a footer; the other one is a stream."""


def page_header(data: bytes) -> tuple[dict[int, Any], int]:
    """Numbers of a page's header by field number (2: bytes unpacked, 3: bytes in the file), and the header's length.

    It is a struct of Thrift's compact protocol; its fields stand in parquet.thrift, of the Parquet format.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value

    def item(kind: int) -> Any:
        nonlocal at
        if kind in (1, 2):  # in the kind itself
            return kind == 1
        if kind in (3, 7, 8):
            size = {3: 1, 7: 8}.get(kind) or varint()
            at += size
            return None
        if kind in (4, 5, 6):
            return (number := varint()) >> 1 ^ -(number & 1)
        if kind == 12:
            return record()
        raise ValueError(f"a header of a page has a field of kind {kind}: the file is damaged")

    def record() -> dict[int, Any]:
        nonlocal at
        fields: dict[int, Any] = {}
        number = 0
        while head := data[at]:
            at += 1
            number = number + (head >> 4) if head >> 4 else item(4)
            fields[number] = item(head & 15)
        at += 1
        return fields

    try:
        fields = record()
    except (IndexError, RecursionError):
        fields = {}
    if not all(isinstance(fields.get(number), int) for number in (2, 3)):
        raise ValueError("a header of a page says no sizes, or does not end: the file is damaged")
    return fields, at


def messages(source: Any) -> Iterator[pa.Message]:
    """What an Arrow file of either form is made of; their bodies are copied only if `source` is not in memory.

    Raises:
        ValueError: the file is damaged.
    """
    source.seek(0)
    if source.read(len(FEATHER)) != FEATHER:
        source.seek(0)
        yield from pa.ipc.MessageReader.open_stream(source)
        return
    end = source.size() - len(FEATHER) - 4
    source.seek(max(0, end))
    start = end - int.from_bytes(source.read(4), "little")
    if start < 0:
        raise ValueError("its end is damaged or missing: it was not written, or not copied, to its end")
    source.seek(start)
    footer = _Table.root(source.read(end - start))
    for blocks in (2, 3):  # Footer.dictionaries, Footer.recordBatches: of (offset, length of the head, of the body)
        for offset, _, _ in footer.structs(blocks, "<qi4xq"):
            source.seek(offset)
            yield pa.ipc.read_message(source)


class _Table:
    """A table of a flatbuffer; the numbers of the fields stand in Arrow's Message.fbs and File.fbs."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    @classmethod
    def root(cls, data: bytes) -> "_Table":
        return cls(data, struct.unpack_from("<I", data)[0])

    def place(self, field: int) -> int:
        """Where a field's value stands; 0: it is not there."""
        head = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        if 4 + 2 * field >= struct.unpack_from("<H", self.data, head)[0]:
            return 0
        offset = struct.unpack_from("<H", self.data, head + 4 + 2 * field)[0]
        return self.at + offset if offset else 0

    def table(self, field: int) -> "_Table":
        place = self.place(field)
        return _Table(self.data, place + struct.unpack_from("<I", self.data, place)[0])

    def structs(self, field: int, layout: str) -> list[tuple[int, ...]]:
        if not self.place(field):
            return []
        start = self.table(field).at
        count = struct.unpack_from("<I", self.data, start)[0]
        return list(struct.iter_unpack(layout, self.data[start + 4 :][: count * struct.calcsize(layout)]))


def unpacked_bytes(message: pa.Message) -> int:
    """What the rows, or the dictionary, of a message unpack to, by what its buffers say; 0: it is not packed."""
    if message.type not in ("record batch", "dictionary"):
        return 0
    head = message.metadata.to_pybytes()
    batch = _Table.root(head).table(2)  # Message.header
    if message.type == "dictionary":
        batch = batch.table(1)  # DictionaryBatch.data
    if not batch.place(3) and b"experimental_compression" not in head:  # RecordBatch.compression; of Arrow 0.17
        return 0
    places = (offset for offset, length in batch.structs(2, "<qq") if length >= 8)  # RecordBatch.buffers
    sizes = (int.from_bytes(message.body[offset : offset + 8], "little", signed=True) for offset in places)
    return sum(max(0, size) for size in sizes)
