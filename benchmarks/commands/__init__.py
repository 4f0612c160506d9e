"""The subcommands of ``python -m benchmarks``, one module each, with its arguments and its page."""
