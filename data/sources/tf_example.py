"""Parses tf.train.Example messages from their wire format, without TensorFlow or protobuf."""


def parse_example(record: bytes) -> dict[str, list[bytes]] | None:
    """Returns the bytes features of a tf.train.Example; None if `record` is not one.

    Example{1: Features{1: map<string, Feature{1: BytesList{1: bytes}}>}} in protobuf's wire format.
    """
    try:
        features: dict[str, list[bytes]] = {}
        outer = _fields(record)
        if not outer or any(number != 1 for number, _ in outer):
            return None
        for _, content in outer:
            for number, entry in _fields(content):
                if number != 1:
                    return None
                pair = dict(_fields(entry))
                lists = _fields(pair.get(2, b""))
                features[pair[1].decode()] = [v for n, values in lists if n == 1 for _, v in _fields(values)]
        return features
    except (IndexError, KeyError, UnicodeDecodeError, ValueError):
        return None


def _fields(message: bytes) -> list[tuple[int, bytes]]:
    """Returns the length-delimited fields of a protobuf message. Raises: ValueError for any other wire type."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        tag = varint()
        if tag & 7 != 2:
            raise ValueError("not length-delimited")
        size = varint()
        if at + size > len(message):
            raise ValueError("truncated")
        found.append((tag >> 3, message[at : at + size]))
        at += size
    return found
