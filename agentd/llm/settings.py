"""`[llm]` of the configuration: providers, routes, prices."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from agentd.core.errors import InvalidField
from agentd.llm.prices import Price

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]


class Kind(StrEnum):
    """What a provider speaks: the OpenAI API, or nothing (`scripted`: built in, deterministic, not a model)."""

    OPENAI = "openai"
    SCRIPTED = "scripted"


class Provider(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One upstream. `credential` names a file in `/etc/agentd/credentials/` or a systemd credential."""

    name: Name
    kind: Kind = Kind.OPENAI
    base_url: str = ""
    credential: str | None = None
    models: tuple[str, ...] = ()
    free: bool = False
    first_byte_timeout_s: float = 120.0
    total_timeout_s: float = 900.0


class LlmSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Providers by order, and routes: a name that agents ask for → `provider/model`. `default` takes every other name."""

    providers: tuple[Provider, ...] = ()
    routes: dict[str, str] = {}
    prices: dict[str, Price] = {}


class Route(msgspec.Struct, frozen=True):
    """Where one request goes: the provider and the model's name there."""

    provider: Provider
    model: str


class Routes:
    """Routing as a decision over the settings. Without any provider the built-in `scripted` one answers."""

    def __init__(self, settings: LlmSettings):
        self.providers = settings.providers or (
            Provider(name="scripted", kind=Kind.SCRIPTED, models=("scripted",), free=True),
        )
        self._by_name = {provider.name: provider for provider in self.providers}
        if len(self._by_name) != len(self.providers):
            raise InvalidField("cannot use [llm]: two providers have the same name", field="llm.providers")
        for provider in self.providers:
            if provider.kind is Kind.OPENAI and not provider.base_url.startswith(("http://", "https://")):
                raise InvalidField(
                    f"cannot use [llm]: provider {provider.name!r}: base_url {provider.base_url!r} is not an http or https URL",
                    field="llm.providers.base_url",
                    hint="for example https://api.openai.com/v1",
                )
        self._routes = {name: self._parse(name, target) for name, target in settings.routes.items()}
        if "default" not in self._routes:
            first = self.providers[0]
            self._routes["default"] = Route(first, first.models[0] if first.models else "")

    def _parse(self, name: str, target: str) -> Route:
        provider, _, model = target.partition("/")
        if provider not in self._by_name or not model:
            known = ", ".join(self._by_name)
            raise InvalidField(
                f"cannot use [llm.routes]: {name} = {target!r} is not PROVIDER/MODEL",
                field=f"llm.routes.{name}",
                hint=f"providers: {known}",
            )
        return Route(self._by_name[provider], model)

    def choose(self, model: str) -> Route:
        """A route's name, `provider/model`, a model that a provider lists, or that model at the default route's provider."""
        if model in self._routes:
            found = self._routes[model]
            return found if found.model else Route(found.provider, model)
        provider, _, rest = model.partition("/")
        if rest and provider in self._by_name:
            return Route(self._by_name[provider], rest)
        for one in self.providers:
            if model in one.models:
                return Route(one, model)
        return Route(self._routes["default"].provider, model)

    def names(self) -> list[str]:
        """The models an agent may see listed: the default route's first."""
        default = self._routes["default"].model
        found = [default] if default else []
        found += [model for provider in self.providers for model in provider.models]
        found += [name for name in self._routes if name != "default"]
        return list(dict.fromkeys(found))
