"""`python -m agentd.daemon`: the daemon. `config check [FILE]` and `config show` read the configuration and end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from agentd.core.errors import AgentdError
from agentd.core.places import Places
from agentd.daemon import config


def main(argv: list[str]) -> int:
    """0 after SIGTERM; 2 for a wrong call, 78 (EX_CONFIG) when the configuration is wrong."""
    places = Places.from_environ()
    try:
        if argv[:2] == ["config", "check"] and len(argv) <= 3:
            if len(argv) == 3:
                config.check_file(Path(argv[2]))
            else:
                config.load(places)
                config.credentials(places)
            print("the configuration is valid")
            return 0
        if argv == ["config", "show"]:
            print(json.dumps(config.show(config.load(places)), indent=2))
            return 0
        if argv:
            print("usage: python -m agentd.daemon [config check [FILE] | config show]", file=sys.stderr)
            return 2
        settings = config.load(places)
    except AgentdError as error:
        print(f"agentd: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 78 if not argv else 1
    import uvloop

    from agentd.daemon import logging
    from agentd.daemon import main as program

    logging.set_up(settings.log.level)
    try:
        uvloop.run(program.serve(places, settings))
    except AgentdError as error:
        print(f"agentd: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
