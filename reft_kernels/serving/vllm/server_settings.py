"""What ``reft-serve`` passes to the plugin of the HTTP server, as JSON in one variable."""

from __future__ import annotations

import dataclasses

SETTINGS = "REFT_KERNELS_SERVE"


@dataclasses.dataclass
class ServerSettings:
    """Settings of the HTTP server's plugin.

    Attributes:
        adapters: folders by name, loaded before the server answers.
        adapter_root: the directory from which clients may load; None if they may not.
    """

    adapters: dict[str, str] = dataclasses.field(default_factory=dict)
    adapter_root: str | None = None
