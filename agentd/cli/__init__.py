"""`agentctl`: the command line. It speaks docs/api.md over the control socket and knows nothing else of the
daemon.

Only the standard library and `agentd.core` are imported, and each verb's module only when it is asked for:
start-up is what a person at a prompt and a script in a loop pay every time.
"""
