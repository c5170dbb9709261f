"""Files that torch has written, read without torch and without running their pickle."""
