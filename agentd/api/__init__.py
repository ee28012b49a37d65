"""HTTP: the control API for people (Unix socket) and the agent API for what runs inside (`http://agentd.internal`)."""
