"""`python -m agentd.warden`: the privileged process; `AGENTD_ROOT` says where its files lie. `end` ends every sandbox and cleans up instead."""

from __future__ import annotations

import sys

from agentd.core.errors import AgentdError
from agentd.core.places import Places
from agentd.warden import config, server


def main() -> int:
    """0 after SIGTERM, 2 for a wrong call, 78 (EX_CONFIG) when warden.toml is wrong."""
    places = Places.from_environ()
    if sys.argv[1:] not in ([], ["end"]):
        print("usage: python -m agentd.warden [end]", file=sys.stderr)
        return 2
    try:
        if sys.argv[1:] == ["end"]:
            server.end(places, config.load(places))
        else:
            server.run(places, config.load(places))
    except AgentdError as error:
        print(f"<3>agentd-warden: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"<3>remedy: {error.hint}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
