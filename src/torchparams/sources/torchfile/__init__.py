"""Readers of files that torch writes; they need no torch and do not execute the pickle."""
