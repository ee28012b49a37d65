"""Layer 7: what a task is, the states it goes through, which starts next, and the supervision of what runs."""
