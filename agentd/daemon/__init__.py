"""Configuration, wiring, start and stop, logging."""
