"""agentd: runs autonomous agents on one Linux host, isolated, limited and accounted for."""

__version__ = "0.1.0"
