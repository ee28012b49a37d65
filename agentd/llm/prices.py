"""What a call costs: prices are data with a date; an unknown price is said, never taken for zero."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources

import msgspec


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """US dollars per million tokens; `cached` are input tokens read from the provider's prompt cache."""

    input: float
    output: float
    cached: float | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens as the provider counted them; `input_tokens` includes the cached ones."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


def built_in() -> dict[str, Price]:
    """The prices that come with agentd."""
    raw = tomllib.loads(resources.files("agentd.llm").joinpath("prices.toml").read_text())
    return msgspec.convert(raw["models"], dict[str, Price])


def cost_usd(usage: Usage, model: str, prices: Mapping[str, Price], *, free: bool = False) -> float | None:
    """Dollars, or None when the price is unknown. A dated name (`gpt-4o-2024-08-06`) has its family's price."""
    if free or not (usage.input_tokens or usage.output_tokens):
        return 0.0
    price = prices.get(model) or next(
        (prices[name] for name in sorted(prices, key=len, reverse=True) if model.startswith(name + "-20")), None
    )
    if price is None:
        return None
    cached = min(usage.cached_tokens, usage.input_tokens)
    rate = price.cached if price.cached is not None else price.input
    return ((usage.input_tokens - cached) * price.input + cached * rate + usage.output_tokens * price.output) / 1e6
