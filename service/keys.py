"""Keys of callers and of the administrator: kept as digests, compared in constant time."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Final

_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)


class Keys:
    """A set of keys, each given as itself or as `sha256:<64 hexadecimal digits>`.

    A plain SHA-256 is enough for keys that a machine made up; words that a person would remember
    could be guessed from their digest.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [
            bytes.fromhex(found[1])
            if (found := _DIGEST.fullmatch(key))
            else hashlib.sha256(key.encode()).digest()
            for key in keys
        ]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._digests)

    def open_for(self, authorization: bytes) -> bool:
        """Whether `Bearer <key>` carries one of them; how long that takes tells nothing about them."""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key).digest()
        is_known = False
        for one in self._digests:
            is_known |= hmac.compare_digest(digest, one)
        return is_known and scheme.lower() == b"bearer"
