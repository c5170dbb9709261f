"""The command line: one module a command, and none of them with logic of its own."""

COMMANDS = (
    *("ls", "show", "explain", "stats", "diff", "digest", "verify", "audit"),
    *("convert", "delta", "apply", "merge", "lora"),
)
"""The modules that hold a command each, in the order in which `--help` lists them."""

SUBCOMMANDS = {"lora": ("fold", "extract")}
"""The commands of those that are a group."""
