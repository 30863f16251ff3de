"""Adapters at the endpoint: what may be loaded, and what the engine holds. Importing this loads no torch.

base = BaseFacts.of("model-folder", max_rank=16)
facts = check_adapter("handbook", base)             # UserError: one sentence, why not
registry = AdapterRegistry(base, EngineDriver(engine), resident=4, staging=Path("run/adapters"))
await registry.add("handbook", "./handbook")
async with registry.hold("handbook"):               # the engine holds it within
    ...
"""

from agentopt.serving.adapters._base import BaseFacts
from agentopt.serving.adapters._check import AdapterFacts, check_adapter, check_name, parse_adapter
from agentopt.serving.adapters._driver import Driver, EngineDriver
from agentopt.serving.adapters._entry import AdapterStatus
from agentopt.serving.adapters._hashes import BaseHashes
from agentopt.serving.adapters._registry import AdapterRegistry

__all__ = [
    "AdapterFacts",
    "AdapterRegistry",
    "AdapterStatus",
    "BaseFacts",
    "BaseHashes",
    "Driver",
    "EngineDriver",
    "check_adapter",
    "check_name",
    "parse_adapter",
]
