"""The parts of the selector language: globs, the tree of a selector, its parser, and what it hits in a table."""
