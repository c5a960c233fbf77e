"""The command line: one module per group of commands, one sink for output, one table from errors to exit codes."""
