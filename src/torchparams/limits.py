"""Every limit, in one place: what a file may ask of the reader before it is refused.

A limit guards memory or time against a file that nobody vouches for. Each can be raised by
assigning to the module's attribute.
"""

from __future__ import annotations

HEADER_BYTES = 100_000_000
"""Longest safetensors header, in bytes; the format's own limit."""

INDEX_BYTES = 100_000_000
"""Longest index of a sharded checkpoint, in bytes."""

MANIFEST_BYTES = 100_000_000
"""Longest manifest of digests, in bytes."""

PICKLE_BYTES = 256 << 20
"""Longest `data.pkl`, in bytes, inflated where it is compressed."""

PICKLE_OPERATIONS = 2_000_000
"""Most operations that the pickles of one file may run, beside one for every 32 bytes of the file.

An operation takes about 150 bytes of memory at most, listing included; a tensor of a state dict takes about 40
operations.
"""

NESTING = 1_000
"""Deepest nesting of containers that is listed."""

EXPANDED_ELEMENTS = 1 << 28
"""Most elements that the tensors of one file may have together beyond eight for each that it stores.

A view may show elements many times over: it is expanded (a stride of zero), its rows overlap, or others show the same.
"""

INFLATED_BYTES = 1 << 32
"""Most bytes that one compressed member of a zip may inflate to."""

INFLATED_RATIO = 64
"""Most bytes that the compressed members of a zip may inflate to together, for each byte that they take in the file;
64 MiB are allowed in any case. Weights inflate to twice their size at most, and DEFLATE can give a thousandfold."""

ALIASES = 100_000
"""Most further names that are listed of the tied tensors of one network.

Modules that are shared within shared modules give a tensor exponentially many. Beyond the limit each tied tensor lists
some of its names, at least one; all of them are still accepted.
"""

SELECTOR_NESTING = 32
"""Deepest nesting of parentheses, complements and braces in a selector."""

NAME_LENGTH = 4096
"""Longest name of a tensor in a file, in characters; longer ones are neither read nor written."""

NAME_CHARACTERS = 1 << 26
"""Most characters that all names in one file may have together, shared parts counted once for each path."""

REMOTE_CACHE_BYTES = 64 << 20
"""Most bytes of remote files that wait in memory, all files together; ranges that are waited for come beside that."""

REMOTE_SECONDS = 30.0
"""Most seconds to wait for a server to answer, and between two bytes of an answer."""

REMOTE_WHOLE_BYTES = 64 << 20
"""Largest remote file that is read as a whole: a plain pickle, which cannot be listed from a part of it."""

REGEX_STEPS = 1 << 28
"""Most steps that Python's `re` may take on one name; beyond, an automaton that is linear in the name matches it."""

REGEX_SECONDS = 10.0
"""Most seconds that one regular expression may take on all names together."""

REGEX_STATES = 10_000
"""Most states of the automaton of a regular expression."""

REGEX_CHARACTERS = 1_000
"""Longest regular expression in a file, such as the `rank_pattern` of an adapter."""

RANKS_SECONDS = 300.0
"""Longest time that a call on sharded tensors waits for the other ranks to make it too."""
