"""Z85, the text form of CURVE keys (ZeroMQ RFC 32): five characters of base 85 for four bytes, big-endian."""

from __future__ import annotations

from splitfl.errors import KeyFileError

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_Z85_VALUES = {character: value for value, character in enumerate(_Z85)}


def z85_decode(text: bytes) -> bytes:
    """The 32 bytes behind a key in Z85.

    Raises:
        KeyFileError: it is not such a key.
    """
    values = [_Z85_VALUES.get(chr(byte), -1) for byte in text]
    if len(values) != 40 or min(values) < 0:
        raise KeyFileError("A CURVE key is malformed.", expected="40 characters of Z85")
    words = []
    for i in range(0, 40, 5):
        word = 0
        for value in values[i : i + 5]:
            word = word * 85 + value
        if word >= 2**32:
            raise KeyFileError("A CURVE key is malformed.", expected="40 characters of Z85")
        words.append(word.to_bytes(4, "big"))
    return b"".join(words)
