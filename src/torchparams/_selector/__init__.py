"""Implementation of the selector language: globs, parser, syntax tree, and evaluation."""
