"""Layer 2, first form: which task speaks from which address. Policy, names and egress grow here."""
