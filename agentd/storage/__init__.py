"""Layer 3: what is kept. LMDB belongs to this package alone."""
