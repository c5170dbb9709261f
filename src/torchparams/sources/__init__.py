"""Sources: each lists named parameters and reads their values."""
