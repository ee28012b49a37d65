"""Where things lie. `AGENTD_ROOT` puts every place below another directory, as `DESTDIR` does for installs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Places:
    """The paths of one agentd; `root` is `/` on an installed host."""

    root: Path

    @classmethod
    def from_environ(cls) -> Places:
        """The places that `AGENTD_ROOT` asks for."""
        return cls(Path(os.environ.get("AGENTD_ROOT") or "/").absolute())

    @property
    def config(self) -> Path:
        """Directory of `agentd.toml`, `agentd.toml.d/`, `warden.toml` and `credentials/`."""
        return self.root / "etc/agentd"

    @property
    def run(self) -> Path:
        """Runtime directory of the daemon."""
        return self.root / "run/agentd"

    @property
    def control_socket(self) -> Path:
        """Where `agentctl` finds the daemon."""
        return self.run / "agentd.sock"

    @property
    def warden_run(self) -> Path:
        """Runtime directory of the warden: root only."""
        return self.root / "run/agentd-warden"

    @property
    def warden_socket(self) -> Path:
        """Where the daemon finds the warden."""
        return self.warden_run / "warden.sock"

    @property
    def state(self) -> Path:
        """What outlives a restart."""
        return self.root / "var/lib/agentd"

    @property
    def workspaces(self) -> Path:
        """One directory per task; made, owned and removed by the warden."""
        return self.root / "var/lib/agentd-warden/workspaces"
