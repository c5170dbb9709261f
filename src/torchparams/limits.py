"""Limits for reading untrusted files.

A limit protects memory or time against hostile files. To raise one, assign to the module attribute.
"""

from __future__ import annotations

HEADER_BYTES = 100_000_000
"""Maximum length of a safetensors header, in bytes; also the limit of the format."""

INDEX_BYTES = 100_000_000
"""Maximum length of the index of a sharded checkpoint, in bytes."""

MANIFEST_BYTES = 100_000_000
"""Maximum length of a manifest, in bytes."""

PICKLE_BYTES = 256 << 20
"""Maximum length of `data.pkl`, in bytes, after decompression."""

PICKLE_OPERATIONS = 2_000_000
"""Maximum number of operations for the pickles of one file, plus one for every 32 bytes of the file.

An operation takes at most about 150 bytes of memory, including the listing; a tensor of a state dict takes about 40
operations.
"""

NESTING = 1_000
"""Maximum nesting of containers."""

EXPANDED_ELEMENTS = 1 << 28
"""Maximum number of elements of all tensors of a file together, beyond eight for each stored element.

Views can repeat elements: expanded tensors (stride zero), overlapping rows, several views of one storage.
"""

INFLATED_BYTES = 1 << 32
"""Maximum decompressed size of one zip member, in bytes."""

INFLATED_RATIO = 64
"""Maximum decompressed size of all compressed members of a zip, relative to their compressed size; 64 MiB are always
allowed. Weights expand at most twofold; DEFLATE can expand a thousandfold."""

ALIASES = 100_000
"""Maximum number of listed aliases of the tied tensors of one network.

Nested shared modules give a tensor exponentially many names. Beyond the limit, each tied tensor lists some of its
names, at least one; all of them are still accepted.
"""

SELECTOR_NESTING = 32
"""Maximum nesting of parentheses, complements and braces in a selector."""

NAME_LENGTH = 4096
"""Maximum length of a tensor name in a file, in characters, for reading and writing."""

NAME_CHARACTERS = 1 << 26
"""Maximum total length of all names in a file, in characters; shared parts count once per path."""

REMOTE_CACHE_BYTES = 64 << 20
"""Most bytes of remote files that wait in memory, all files together; ranges that are waited for come beside that."""

REMOTE_SECONDS = 30.0
"""Most seconds to wait for a server to answer, and between two bytes of an answer."""

REMOTE_WHOLE_BYTES = 64 << 20
"""Largest remote file that is read as a whole: a plain pickle, which cannot be listed from a part of it."""

REGEX_STEPS = 1 << 28
"""Maximum steps of Python's `re` on one name; beyond it, a linear-time automaton does the matching."""

REGEX_SECONDS = 10.0
"""Maximum time of one regular expression on all names together, in seconds."""

REGEX_STATES = 10_000
"""Maximum number of states of the automaton of a regular expression."""

REGEX_CHARACTERS = 1_000
"""Maximum length of a regular expression in a file, such as an adapter's `rank_pattern`, in characters."""

RANKS_SECONDS = 300.0
"""Maximum time that a call on sharded tensors waits for the other ranks, in seconds."""
