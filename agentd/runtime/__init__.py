"""Layer 6, first form: what an agent program finds when it starts. The built-in loop and the recipes grow here."""
