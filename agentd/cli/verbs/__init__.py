"""One module per verb: `EXAMPLES`, `arguments(parser)` and `run(call) -> exit code`."""
