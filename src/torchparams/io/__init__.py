"""Files, blocks of their bytes, and threads: everything that reads goes through here."""
