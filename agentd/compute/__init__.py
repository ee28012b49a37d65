"""Layer 0: what the host has, and what may be admitted to it."""
