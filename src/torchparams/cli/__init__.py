"""The command line: one module per command, without logic of its own."""

COMMANDS = (
    *("ls", "show", "explain", "stats", "spectra", "diff", "report", "digest", "verify", "catalog", "audit"),
    *("history", "diagnose", "convert", "delta", "apply", "merge", "lora"),
)
"""Command modules, in the order of `--help`."""

SUBCOMMANDS = {"lora": ("fold", "extract")}
"""Commands of each command group."""
