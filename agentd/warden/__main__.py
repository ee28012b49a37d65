"""`python -m agentd.warden`: the privileged process. It takes no arguments; `AGENTD_ROOT` says where its files lie."""

from __future__ import annotations

import sys

from agentd.core.errors import AgentdError
from agentd.core.places import Places
from agentd.warden import config, server


def main() -> int:
    """0 after SIGTERM, 78 (EX_CONFIG) when warden.toml is wrong."""
    places = Places.from_environ()
    try:
        server.run(places, config.load(places))
    except AgentdError as error:
        print(f"<3>agentd-warden: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"<3>remedy: {error.hint}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
