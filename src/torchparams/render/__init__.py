"""Render results: terminal, JSON, notebook, Arrow, and progress bars."""
