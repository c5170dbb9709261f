"""Input and output: files, blocks of bytes, and threads. All reading goes through this package."""
