"""The only privileged code: makes, watches and destroys sandboxes for the daemon, whom it trusts with nothing.

Processes: `server` (root, single-threaded, synchronous) → `zygote` (exec'ed, hardly any imports, forks) → one `pid1` per sandbox.
"""
