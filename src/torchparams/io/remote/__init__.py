"""Remote files, read by ranges through fsspec, which is imported when the first one is opened."""
