"""Layer 1: the daemon's end of the conversation with the warden. Specs are `core.wire`, mechanism is `warden`."""
