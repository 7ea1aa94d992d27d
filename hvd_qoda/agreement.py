"""Agreement: every rank finds out, before any gradient is sent, whether all ranks run the same thing.

Horovod prefixes its collectives' names by operation, so an all-reduce on one rank against an all-gather on another
waits for ever, and all-gathers of unequal sizes pass silently. So the first exchange of all is an all-gather with a
fixed name and a fixed size: a digest of everything that ranks must agree on. Only if the digests differ do the
descriptions themselves travel, and then every rank raises an error that names the differences.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_qoda.errors import RankMismatchError
from hvd_qoda.transport import Transport, all_gather_bytes

__all__ = ["check_agreement"]

_DIGEST_BYTES = 32
_SUMMARY = struct.Struct(f"<{_DIGEST_BYTES}sQ")  # digest, length of the description
_SHOWN_DIFFERENCES = 8
_SHOWN_CHARACTERS = 120


def check_agreement(transport: Transport, description: Mapping[str, Any], name: str = "hvd_qoda.agreement") -> None:
    """Compare a description among all ranks; a collective call that waits.

    Args:
        transport: the ranks.
        description: JSON-able values; mappings may be nested. Differences are named in this order.
        name: of the collectives, the same on every rank and in every version of this package.

    Raises:
        RankMismatchError: on every rank, naming what differs and the ranks, if any two descriptions differ.
    """
    text = json.dumps(description, separators=(",", ":")).encode()
    summary = _SUMMARY.pack(hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest(), len(text))
    summaries = all_gather_bytes(transport, summary, [_SUMMARY.size] * transport.size, f"{name}.digest")
    if all(other == summary for other in summaries):
        return
    lengths = [_SUMMARY.unpack(other)[1] for other in summaries]
    texts = all_gather_bytes(transport, text, lengths, f"{name}.description")
    found = _differences([json.loads(other) for other in texts], transport.ranks)
    rest = len(found) - _SHOWN_DIFFERENCES
    shown = "; ".join(found[:_SHOWN_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")
    raise RankMismatchError(f"the ranks do not agree: {shown}. Nothing was exchanged; give every rank the same.")


def _differences(descriptions: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> list[str]:
    """One sentence for each key whose values differ: which ranks hold which value."""
    flat = [_flatten(description) for description in descriptions]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    sentences = []
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank, values in zip(ranks, flat, strict=True):
            holders.setdefault(_shown(values[key]) if key in values else "absent", []).append(rank)
        if len(holders) > 1:
            sentences.append(f"{key}: " + ", ".join(f"{value} on {_ranks(on)}" for value, on in holders.items()))
    return sentences


def _flatten(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in description.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}: "))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    """The value as text; long ones are cut, and told apart by a digest."""
    text = json.dumps(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}... (digest {hashlib.blake2b(text.encode(), digest_size=4).hexdigest()})"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
