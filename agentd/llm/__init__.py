"""Layer 4, first form: OpenAI chat completions to a configured upstream, with usage and cost. Dialects, retries, limits and caches grow here."""
